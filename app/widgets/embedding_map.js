// `at` is the point under the pointer or the keyboard's place; only points that the filters leave can be chosen.
const canvas = element.querySelector('canvas'), tip = element.querySelector('.map-tip');
const legend = element.querySelector('.map-legend'), EDGE = 14, REACH = 16, NAMED = 60;
let at = -1;
const data = () => (props.value && props.value.ids ? props.value : null);
const side = () => canvas.clientWidth;
const along = (share) => EDGE + share / 10000 * (side() - 2 * EDGE);
const spot = (map, i) => [along(map.x[i]), along(10000 - map.y[i])];
const colour = (map, i) => map.colours[map.codes[i] % map.colours.length];

function dot(pen, map, i, radius) {
  const [x, y] = spot(map, i);
  pen.beginPath();
  pen.arc(x, y, radius, 0, 2 * Math.PI);
}

function draw() {
  const map = data(), size = side();
  if (!size) return;
  const scale = window.devicePixelRatio || 1, pen = canvas.getContext('2d');
  canvas.width = canvas.height = Math.round(size * scale);
  pen.scale(scale, scale);
  if (!map) return;
  const radius = map.ids.length > 1500 ? 2.5 : 4;
  pen.fillStyle = 'rgba(128, 128, 128, .28)';
  map.ids.forEach((_, i) => { if (!map.shown[i]) { dot(pen, map, i, radius - 1); pen.fill(); } });
  pen.globalAlpha = .85;
  map.ids.forEach((_, i) => {
    if (!map.shown[i]) return;
    pen.fillStyle = colour(map, i);
    dot(pen, map, i, radius);
    pen.fill();
  });
  pen.globalAlpha = 1;
  pen.strokeStyle = getComputedStyle(canvas).color;
  pen.lineWidth = 2;
  for (const i of [map.selected, at]) if (i >= 0 && i < map.ids.length) { dot(pen, map, i, radius + 3); pen.stroke(); }
}

function list() {
  const map = data();
  legend.replaceChildren();
  if (!map) return;
  const counts = new Map();
  map.codes.forEach((code, i) => { if (map.shown[i]) counts.set(code, (counts.get(code) || 0) + 1); });
  const codes = [...counts.keys()].sort((one, other) => one - other);
  for (const code of codes.slice(0, NAMED)) {
    const item = document.createElement('li'), mark = document.createElement('span');
    mark.style.background = map.colours[code % map.colours.length];
    item.append(mark, `${map.names[code]} (${counts.get(code)})`);
    legend.append(item);
  }
  if (codes.length > NAMED) {
    const item = document.createElement('li');
    item.textContent = `and ${codes.length - NAMED} more`;
    legend.append(item);
  }
}

function point(i) {
  if (i === at) return;
  at = i;
  const map = data();
  tip.hidden = i < 0;
  if (i >= 0) {
    const [x, y] = spot(map, i), name = map.names[map.codes[i]];
    const query = new URLSearchParams({gallery: map.gallery, id: map.ids[i], side: '128'});
    tip.querySelector('img').src = `${ROUTE}?${query}`;
    tip.querySelector('span').textContent = `${name} · ${map.ids[i]}`;
    tip.style.left = `${Math.max(0, Math.min(x + 12, side() - 140))}px`;
    tip.style.top = y > side() / 2 ? 'auto' : `${y + 12}px`;
    tip.style.bottom = y > side() / 2 ? `${side() - y + 12}px` : 'auto';
  }
  draw();
}

function nearest(x, y, reach, allowed = () => true) {
  const map = data();
  let best = -1, least = reach * reach;
  if (map) map.ids.forEach((_, i) => {
    if (!map.shown[i] || !allowed(i)) return;
    const [left, top] = spot(map, i), distance = (left - x) ** 2 + (top - y) ** 2;
    if (distance <= least) { best = i; least = distance; }
  });
  return best;
}

const under = (event) => {
  const box = canvas.getBoundingClientRect();
  return nearest(event.clientX - box.left, event.clientY - box.top, REACH);
};
const open = (i) => { const map = data(); if (map && i >= 0) trigger('select', {index: i, value: map.ids[i]}); };
canvas.addEventListener('pointermove', (event) => point(under(event)));
canvas.addEventListener('pointerleave', () => point(-1));
canvas.addEventListener('click', (event) => open(under(event)));
canvas.addEventListener('keydown', (event) => {
  const way = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
  const map = data();
  if (!map || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === 'Enter' || event.key === ' ') { event.preventDefault(); open(at); return; }
  if (event.key === 'Escape') { point(-1); return; }
  if (!way) return;
  event.preventDefault();
  event.stopPropagation();
  if (at < 0) { point(nearest(side() / 2, side() / 2, 2 * side())); return; }
  const [x, y] = spot(map, at);
  // In the direction of the key, up to 45 degrees to either side.
  const next = nearest(x, y, 2 * side(), (i) => {
    const [left, top] = spot(map, i), ahead = (left - x) * way[0] + (top - y) * way[1];
    return i !== at && ahead > .5 && ahead >= Math.abs((left - x) * way[1]) + Math.abs((top - y) * way[0]);
  });
  if (next >= 0) point(next);
});
canvas.addEventListener('blur', () => point(-1));
watch('value', () => { at = -1; tip.hidden = true; list(); draw(); });
new ResizeObserver(draw).observe(canvas);
list();
draw();
