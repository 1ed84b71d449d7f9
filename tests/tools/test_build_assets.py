from cantata.core.locate import asset
from cantata.tools.build_assets import ASSETS, train


def test_the_embedded_tokenizer_is_the_one_that_is_built() -> None:
    built = train(ASSETS).to_str(pretty=False)
    assert built == asset("embedded:tokenizer.json").read_text(encoding="utf-8").rstrip("\n")


def test_every_asset_is_attributed() -> None:
    attribution = asset("embedded:ATTRIBUTION.md").read_text(encoding="utf-8")
    for path in ASSETS.iterdir():
        assert path.name == "ATTRIBUTION.md" or f"`{path.name}`" in attribution
    for phrase in ("CC-BY 4.0", "Twitter, Inc. and other contributors", "MIT", "public domain"):
        assert phrase in attribution
