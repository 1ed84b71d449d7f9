"""Runs recipes as a user does: in this process where a run must only end, in others where it is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors

from cantata import cli
from cantata.core.locate import recipes_dir
from cantata.train.preempt import SIGNALS
from cantata.train.restricted_pickle import RestrictedReader

TINY = (
    "experiment=aria_mini",
    "model.vision.num_hidden_layers=1",
    "model.vision.hidden_size=32",
    "model.vision.intermediate_size=32",
    "model.vision.num_attention_heads=2",
    "model.text.num_hidden_layers=2",
    "model.text.hidden_size=32",
    "model.text.num_attention_heads=2",
    "model.text.num_key_value_heads=2",
    "model.text.head_dim=16",
    "model.text.moe.num_experts=4",
    "model.text.moe.top_k=2",
    "model.text.moe.balance.aux_loss_groups=4",
    "model.text.moe.num_shared_experts=1",
    "model.text.moe.expert_intermediate_size=16",
    "train.micro_batch_size=1",
    "train.gradient_accumulation_steps=1",
    "train.eval_every=0",
    "train.log_every=1",
    "engine.precision=fp32",
    "data.num_workers=0",
    "schedule.warmup_steps=2",
)
"""The shipped experiment, small enough for a step in milliseconds."""

TINY_SFT = (
    "experiment=emoji_sft",
    *TINY[1:],
    "train.max_steps=2",
    "accuracy.samples=2",
    "accuracy.max_new_tokens=2",
    "checkpoint.best=null",
)

TINY_LORA = ("experiment=emoji_lora", *TINY_SFT[1:])

TINY_VQ = (
    "experiment=emoji_vq",
    "model.shape.encoder_channels=8",
    "model.shape.decoder_channels=8",
    "model.shape.channel_multipliers=[1,1]",
    "model.shape.attention_levels=[]",
    "model.shape.z_channels=8",
    "collator.sizes=[[16,16]]",
    "train.micro_batch_size=4",
    "train.eval_every=0",
    "train.log_every=1",
    "data.num_workers=0",
    "schedule.warmup_steps=1",
)
"""A tokenizer of emoji at 16 x 16 pixels, 16 codes each."""

SMALL_EMA = ("model.quantizer.num_codes=32", "model.quantizer.dim=4")
"""A codebook as small; other quantisers have other options."""


@contextmanager
def _signals_kept() -> Iterator[None]:
    handlers = [signal.getsignal(number) for number in SIGNALS]
    try:
        yield
    finally:
        for number, handler in zip(SIGNALS, handlers, strict=True):
            signal.signal(number, handler)


def pretrain(out: Path, *overrides: str) -> int:
    """Exit code of `cantata pretrain` with the tiny model, in this process."""
    return run("pretrain", *TINY, f"out={out}", *overrides)


def sft(out: Path, *overrides: str) -> int:
    """Exit code of `cantata sft` with the tiny model on the embedded emoji, in this process."""
    return run("sft", *TINY_SFT, f"out={out}", *overrides)


def lora(out: Path, *overrides: str) -> int:
    """Exit code of `cantata lora` with the tiny model on the embedded emoji, in this process."""
    return run("lora", *TINY_LORA, f"out={out}", *overrides)


def vq(out: Path, *overrides: str) -> int:
    """Exit code of `cantata vq` with a tiny tokenizer on the embedded emoji, in this process."""
    return run("vq", *TINY_VQ, f"out={out}", *overrides)


def tokenize(out: Path, tokenizer: Path, *overrides: str) -> int:
    """Exit code of `cantata tokenize` at the tiny tokenizer's size, in this process."""
    return run("tokenize", f"tokenizer={tokenizer}", f"out={out}", "collator.sizes=[[16,16]]", *overrides)


def run(*arguments: str) -> int:
    """Exit code of a verb, in this process."""
    argv = sys.argv
    with _signals_kept():
        try:
            return cli.main(arguments)
        except SystemExit as end:
            return int(end.code or 0)
        finally:
            sys.argv = argv


def command(
    out: Path, *overrides: str, stage: str = "pretrain", tiny: Sequence[str] | None = None
) -> list[str]:
    """A recipe's command line without its launcher; `tiny` replaces the stage's own small model."""
    if stage == "tokenize":
        return [str(recipes_dir() / "tokenize_images.py"), f"out={out}", *overrides]
    if tiny is None:
        tiny = {"pretrain": TINY, "sft": TINY_SFT, "lora": TINY_LORA, "vq": TINY_VQ}[stage]
    return [str(recipes_dir() / f"{stage}.py"), *tiny, f"out={out}", *overrides]


def start(
    launcher: Sequence[str],
    out: Path,
    *overrides: str,
    stage: str = "pretrain",
    tiny: Sequence[str] | None = None,
) -> subprocess.Popen[str]:
    """Start a recipe with one thread a process."""
    return start_process([sys.executable, *launcher, *command(out, *overrides, stage=stage, tiny=tiny)])


def start_process(arguments: Sequence[str], **variables: str) -> subprocess.Popen[str]:
    """Start a program with one thread a process; more variables of the environment by name."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HYDRA_FULL_ERROR": "0"}
    return subprocess.Popen(
        arguments,
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def torchrun(processes: int) -> list[str]:
    """Several processes on a port that is free."""
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]


def kill(process: subprocess.Popen[str]) -> None:
    """kill -9 for the launcher and everything it started; torchrun's workers are no part of its group."""
    launcher = psutil.Process(process.pid)
    for one in (launcher, *launcher.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            one.kill()
    process.communicate()


def metrics(out: Path) -> list[dict[str, Any]]:
    path = out / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole."""
    reader = RestrictedReader(checkpoint)
    entries = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load_tensors(state, storage_reader=RestrictedReader(checkpoint), no_dist=True)
    return state


def final(out: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint."""
    return tensors(out / "checkpoints" / (out / "LATEST").read_text().strip())
