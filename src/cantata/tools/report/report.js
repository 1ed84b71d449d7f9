'use strict';
document.documentElement.classList.add('js');

function number(text) {
  const value = Number(text);
  if (text === '-') return '-';
  if (value !== 0 && Math.abs(value) < 1e-3) return value.toExponential(3);
  return value.toLocaleString('en', { maximumSignificantDigits: 6 });
}

// The place of the step nearest to `step` in a list that grows.
function nearest(steps, step) {
  let low = 0, high = steps.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle; else high = middle;
  }
  return Math.abs(steps[high] - step) < Math.abs(steps[low] - step) ? high : low;
}

function chart(figure) {
  const plot = figure.querySelector('.plot'), last = Number(plot.dataset.last);
  const at = figure.querySelector('.at'), extremes = figure.querySelector('.extremes');
  const outputs = [...figure.querySelectorAll('.key output')];
  const shownLast = outputs.map((output) => output.value);
  const cross = plot.appendChild(document.createElement('div'));
  let lines = null, all = null, place = -1;
  cross.className = 'cross';

  function read() {
    lines = [...plot.querySelectorAll('[data-points]')].map((path) => {
      const pairs = path.dataset.points.split(',').map((pair) => pair.split(' '));
      return { label: path.dataset.label, steps: pairs.map((pair) => Number(pair[0])), values: pairs.map((pair) => pair[1]) };
    });
    all = [...new Set(lines.flatMap((line) => line.steps))].sort((one, other) => one - other);
  }
  function show(index) {
    place = Math.max(0, Math.min(all.length - 1, index));
    const step = all[place];
    const told = lines.map((line) => line.values[nearest(line.steps, step)]);
    cross.style.left = 100 * step / last + '%';
    plot.classList.add('pointed');
    at.textContent = 'step ' + step.toLocaleString('en');
    outputs.forEach((output, line) => { output.value = number(told[line]); });
    if (extremes) {
      const known = told.map((value, line) => [Number(value), lines[line].label]).filter((pair) => !isNaN(pair[0]));
      known.sort((one, other) => one[0] - other[0]);
      extremes.value = known.length ? `${known[0][1]}: ${number(known[0][0])} ... ${known.at(-1)[1]}: ${number(known.at(-1)[0])}` : '';
    }
  }
  function hide() {
    plot.classList.remove('pointed');
    at.textContent = '';
    outputs.forEach((output, line) => { output.value = shownLast[line]; });
    if (extremes) extremes.value = '';
    place = -1;
  }
  plot.addEventListener('pointermove', (event) => {
    if (!lines) read();
    const box = plot.getBoundingClientRect();
    show(nearest(all, last * (event.clientX - box.left) / box.width));
  });
  plot.addEventListener('pointerleave', hide);
  plot.addEventListener('blur', hide);
  plot.addEventListener('keydown', (event) => {
    if (!lines) read();
    const from = place < 0 ? all.length : place;
    const to = { ArrowLeft: from - 1, ArrowRight: from + 1, Home: 0, End: all.length - 1 }[event.key];
    if (event.key === 'Escape') hide();
    if (to === undefined) return;
    event.preventDefault();
    show(to);
  });
}

function experts(section) {
  const slider = section.querySelector('input'), steps = section.querySelector('.steps');
  const maps = [...section.querySelectorAll('.map')].map((map) => ({
    large: map.querySelector('.large'), cell: map.querySelector('.cell'), frames: [...map.querySelectorAll('.film img')],
    across: Number(map.dataset.experts), down: Number(map.dataset.layers),
  }));
  function show() {
    for (const map of maps) {
      const frame = map.frames[slider.value];
      map.large.src = frame.src;
      map.cell.value = '';
      steps.value = frame.dataset.steps;
      map.frames.forEach((other) => other.classList.toggle('chosen', other === frame));
    }
  }
  slider.addEventListener('input', show);
  for (const map of maps) {
    map.frames.forEach((frame, index) => frame.addEventListener('click', () => { slider.value = index; show(); }));
    map.large.addEventListener('pointermove', (event) => {
      const box = map.large.getBoundingClientRect();
      const expert = Math.min(map.across - 1, Math.max(0, Math.floor(map.across * (event.clientX - box.left) / box.width)));
      const layer = Math.min(map.down - 1, Math.max(0, Math.floor(map.down * (event.clientY - box.top) / box.height)));
      const load = Number(map.frames[slider.value].dataset.loads.split(',')[layer * map.across + expert]);
      const told = load < 0 ? 'dead' : load === 0 ? 'no token' : (load / 100).toFixed(2) + ' of the ideal';
      map.cell.value = `layer ${layer}, expert ${expert}: ${told}`;
    });
    map.large.addEventListener('pointerleave', () => { map.cell.value = ''; });
  }
  show();
}

// A link to a folded part opens it.
function unfold() {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  if (target && target.tagName === 'DETAILS') target.open = true;
}

document.querySelectorAll('.chart').forEach(chart);
document.querySelectorAll('.experts').forEach(experts);
addEventListener('hashchange', unfold);
unfold();
