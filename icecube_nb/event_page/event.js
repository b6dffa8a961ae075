// Draws one event of the page that holds it. `icecube_nb.show` puts this file and the numbers into the page.
// A pulse is [time in us, charge in photo-electrons, auxiliary, x, y, z]; places are in metres.

const content = JSON.parse(document.getElementById('content').textContent);
const byId = id => document.getElementById(id);
const canvas = byId('view');
const pen = canvas.getContext('2d');
const slider = byId('time');

const SPEED_OF_LIGHT_M_PER_US = 299.792;
const ARROW_LENGTH = 0.8;                      // half of an arrow, as a share of the detector's size
const RING_POINTS = 72;
const FRAME_MS = 33;
const FRAMES_PER_FLIGHT = 150;                 // pictures between the first and the last light

const centre = [0, 1, 2].map(i => content.sensors.reduce((sum, s) => sum + s[i], 0) / content.sensors.length);
const size = Math.max(...content.sensors.map(s => Math.hypot(...s.map((v, i) => v - centre[i]))), 1);
const firstTime = content.pulses[0][0];
const lastTime = content.pulses[content.pulses.length - 1][0];
const view = {yaw: 0.6, pitch: 0.25, zoom: 1, time: lastTime, noise: true};

// ---- vectors ----

function add(point, direction, length) {
  return point.map((v, i) => v + length * direction[i]);
}

function cross(a, b) {
  return [a[1]*b[2] - a[2]*b[1], a[2]*b[0] - a[0]*b[2], a[0]*b[1] - a[1]*b[0]];
}

function dot(a, b) {
  return a.reduce((sum, v, i) => sum + v * b[i], 0);
}

function unit(a) {
  return a.map(v => v / Math.hypot(...a));
}

// ---- from metres to the screen ----

// Turn a place about the vertical by `yaw`, tilt it by `pitch`, and draw what is further away smaller.
function project(place) {                      // -> [right, down, depth, pixels in a metre]
  const [x, y, z] = place.map((v, i) => v - centre[i]);
  const {yaw, pitch} = view;
  const right = x*Math.cos(yaw) + y*Math.sin(yaw);
  const inward = y*Math.cos(yaw) - x*Math.sin(yaw);
  const up = z*Math.cos(pitch) + inward*Math.sin(pitch);
  const depth = inward*Math.cos(pitch) - z*Math.sin(pitch);
  const nearer = 4*size / Math.max(4*size + depth, size);
  const scale = 0.4 * Math.min(innerWidth, innerHeight) / size * view.zoom * nearer;
  return [innerWidth/2 + right*scale, innerHeight/2 - up*scale, depth, scale];
}

function drawLine(places, colour, width, fill) {
  pen.beginPath();
  places.map(project).forEach(([x, y], i) => i ? pen.lineTo(x, y) : pen.moveTo(x, y));
  pen.lineWidth = width;
  pen.strokeStyle = colour;
  if (fill) {
    pen.fillStyle = colour + '22';
    pen.fill();
  }
  pen.stroke();
}

function drawDot(place, radius, colour, opacity) {
  const [x, y] = project(place);
  pen.globalAlpha = opacity;
  pen.fillStyle = colour;
  pen.beginPath();
  pen.arc(x, y, radius, 0, 2*Math.PI);
  pen.fill();
  pen.globalAlpha = 1;
}

// ---- what is drawn ----

// An arrow flies through the middle of the light; its head is flat on the screen.
function drawArrow(arrow) {
  const half = ARROW_LENGTH * size;
  const start = add(content.middle, arrow.from, half);
  const end = add(content.middle, arrow.from, -half);
  drawLine([start, end], arrow.colour, 2);
  const [x, y] = project(end);
  const [startX, startY] = project(start);
  const angle = Math.atan2(y - startY, x - startX);
  for (const wing of [2.7, -2.7]) {
    pen.beginPath();
    pen.moveTo(x, y);
    pen.lineTo(x + 13*Math.cos(angle + wing), y + 13*Math.sin(angle + wing));
    pen.stroke();
  }
  if (arrow.cone !== null) drawCone(arrow, half);
}

// The cone of uncertainty ends in a ring, on the side that the neutrino comes from.
function drawCone(arrow, length) {
  const side = unit(cross(arrow.from, Math.abs(arrow.from[2]) < 0.9 ? [0, 0, 1] : [1, 0, 0]));
  const other = cross(arrow.from, side);
  const middle = add(content.middle, arrow.from, length*Math.cos(arrow.cone));
  const ring = [];
  for (let i = 0; i <= RING_POINTS; i++) {
    const turn = 2*Math.PI*i / RING_POINTS;
    const outward = add(side.map(v => v*Math.cos(turn)), other, Math.sin(turn));
    ring.push(add(middle, outward, length*Math.sin(arrow.cone)));
  }
  drawLine(ring, arrow.colour, 1, true);
  for (let i = 0; i < RING_POINTS; i += RING_POINTS/8) {
    drawLine([content.middle, ring[i]], arrow.colour + '55', 1);
  }
}

function colourOf(time) {
  const share = (time - content.early_us) / (content.late_us - content.early_us);
  const last = content.palette.length - 1;
  return content.palette[Math.round(Math.min(Math.max(share, 0), 1) * last)];
}

// A bar with its length in metres, at the depth of the centre.
function drawScale() {
  const metres = [500, 200, 100, 50, 20, 10, 5, 2].find(m => m < size/2) || 1;
  const length = metres * project(centre)[3];
  const left = innerWidth - 16 - length;
  const top = innerHeight - 92;
  pen.fillStyle = '#aeb8c4';
  pen.font = '13px sans-serif';
  pen.textAlign = 'right';
  pen.fillRect(left, top, length, 2);
  pen.fillText(`${metres} m`, innerWidth - 16, top - 6);
}

function drawSensors() {
  pen.fillStyle = '#5b6675';
  for (const sensor of content.sensors) {
    const [x, y] = project(sensor);
    pen.fillRect(x, y, 1, 1);
  }
}

// The pulses so far, far ones first, so that near ones cover them.
function drawPulses() {
  const shown = content.pulses.filter(p => p[0] <= view.time && (view.noise || !p[2]));
  const byDepth = shown.map(p => [project(p.slice(3))[2], p]).sort((a, b) => b[0] - a[0]);
  for (const [, [time, charge, auxiliary, ...place]] of byDepth) {
    const radius = Math.min(2 + 1.6*Math.sqrt(charge), 16) * Math.sqrt(view.zoom);
    drawDot(place, radius, colourOf(time), auxiliary ? 0.3 : 0.9);
  }
  document.body.dataset.shown = shown.length;  // so that a test can read it
}

// A white ball flies along the true direction at the speed of light.
function drawNeutrino() {
  const truth = content.arrows.find(a => a.name === 'truth');
  const flown = SPEED_OF_LIGHT_M_PER_US * (view.time - content.middle_us);
  if (truth && Math.abs(flown) < ARROW_LENGTH*size) {
    drawDot(add(content.middle, truth.from, -flown), 5, '#ffffff', 1);
  }
}

function draw() {
  const ratio = devicePixelRatio || 1;
  canvas.width = innerWidth*ratio;
  canvas.height = innerHeight*ratio;
  canvas.style.width = innerWidth + 'px';
  canvas.style.height = innerHeight + 'px';
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  drawSensors();
  drawScale();
  content.arrows.forEach(drawArrow);
  drawPulses();
  drawNeutrino();
  byId('now').textContent = view.time.toFixed(2) + ' \u00b5s';
}

// ---- the legend ----

function degrees(radians) {
  return (radians*180/Math.PI).toFixed(0) + '\u00b0';
}

function describe(arrow) {
  const first = content.arrows[0];
  let text = `${arrow.name}: azimuth ${arrow.azimuth.toFixed(2)}, zenith ${arrow.zenith.toFixed(2)} rad`;
  if (arrow !== first && first.name === 'truth') {
    text += `, ${degrees(Math.acos(Math.min(dot(first.from, arrow.from), 1)))} off`;
  }
  if (arrow.cone !== null) text += `; ring: its own 68 % cone, ${degrees(arrow.cone)}`;
  return text;
}

function writeLegend() {
  const drawn = content.pulses.length;
  const rest = content.total > drawn ? `, the ${drawn} brightest drawn` : '';
  byId('count').textContent = `${content.total} pulses${rest}`;
  byId('bar').style.background = `linear-gradient(to right, ${content.palette.join(',')})`;
  [content.early_us, content.late_us].forEach((time, i) => {
    byId('ends').children[i].textContent = time.toFixed(1) + ' \u00b5s';
  });
  for (const arrow of content.arrows) {
    const key = document.createElement('span');
    key.className = 'key';
    key.style.background = arrow.colour;
    const line = document.createElement('p');
    line.append(key, describe(arrow));
    byId('arrows').append(line);
  }
}

// ---- what the reader does ----

function show(change) {
  Object.assign(view, change);
  slider.value = view.time;
  draw();
}

canvas.onpointerdown = e => canvas.setPointerCapture(e.pointerId);
canvas.onpointermove = e => {
  if (!e.buttons) return;
  const pitch = view.pitch + e.movementY/150;
  show({yaw: view.yaw - e.movementX/150, pitch: Math.min(Math.max(pitch, -1.57), 1.57)});
};
canvas.addEventListener('wheel', e => {
  e.preventDefault();
  show({zoom: Math.min(Math.max(view.zoom * Math.exp(-e.deltaY/600), 0.3), 12)});
}, {passive: false});
slider.oninput = () => show({time: +slider.value});
byId('noise').onchange = e => show({noise: e.target.checked});

let running;

function pause() {
  clearInterval(running);
  running = undefined;
  byId('play').textContent = 'Play';
}

function advance() {
  const step = Math.max(content.late_us - content.early_us, 0.5) / FRAMES_PER_FLIGHT;
  if (view.time >= lastTime) pause();
  else show({time: Math.min(view.time + step, lastTime)});
}

byId('play').onclick = () => {
  if (running) {
    pause();
    return;
  }
  if (view.time >= lastTime) view.time = Math.max(firstTime, content.early_us - 1);
  byId('play').textContent = 'Stop';
  running = setInterval(advance, FRAME_MS);
};

// The address may set the view, such as #yaw=2&time=11.
function readAddress() {
  for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
    if (name in view) view[name] = name === 'noise' ? value !== 'false' : +value;
  }
}

writeLegend();
readAddress();
const step = (lastTime - firstTime)/1000 || 1;
Object.assign(slider, {min: firstTime, max: lastTime, step, value: lastTime});
byId('noise').checked = view.noise;
addEventListener('resize', draw);
show({});
