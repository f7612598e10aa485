// Reads curves out loud and in numbers: what a pointer or the arrow keys point at. Everything else works without a script.
"use strict";

const names = JSON.parse(document.getElementById("names").textContent);

/** A number in a few characters, as the axes have it. */
function short(value) {
  const size = [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "K"]].find(([size]) => Math.abs(value) >= size && value < 1e15);
  return size ? `${+(value / size[0]).toPrecision(3)}${size[1]}` : `${+value.toPrecision(4)}`;
}

/** From a share of an axis to a value on it. */
function scale(text) {
  const [low, high, log] = text.split(" ").map(Number);
  return log ? (share) => low * (high / low) ** share : (share) => low + share * (high - low);
}

/** The points of a path, gap by gap: arrays of [x, y]. */
function points(path) {
  return path.getAttribute("d").split("M").slice(1).map((part) => {
    const [start, ...steps] = part.split(/[l ]/).map((pair) => pair.split(",").map(Number));
    const found = [start];
    for (const [dx, dy] of steps) found.push([found.at(-1)[0] + dx, found.at(-1)[1] + dy]);
    return found;
  });
}

/** Height of a curve at x, or null where it has a gap. */
function height(parts, x) {
  for (const part of parts) {
    if (x < part[0][0] || x > part.at(-1)[0]) continue;
    const next = Math.max(1, part.findIndex((point) => point[0] >= x));
    if (part.length < 2) return part[0][1];
    const [[x0, y0], [x1, y1]] = [part[next - 1], part[next]];
    return x1 === x0 ? y1 : y0 + ((x - x0) / (x1 - x0)) * (y1 - y0);
  }
  return null;
}

for (const plot of document.querySelectorAll(".plot")) {
  const [, , width, tall] = plot.querySelector("svg").getAttribute("viewBox").split(" ").map(Number);
  const [across, up] = [scale(plot.dataset.x), scale(plot.dataset.y)];
  const readout = plot.closest("figure").querySelector(".readout");
  const cursor = document.createElement("i");
  cursor.className = "cursor";
  cursor.hidden = true;
  plot.append(cursor);
  let lines = null;
  let share = 0.5;

  function look(pointerY) {
    lines ??= [...plot.querySelectorAll(".line")].map((path) => ({ path, arm: +path.dataset.arm, parts: points(path) }));
    cursor.hidden = false;
    cursor.style.left = `${100 * share}%`;
    const found = lines
      .filter(({ path }) => getComputedStyle(path).visibility !== "hidden")
      .map((line) => ({ ...line, y: height(line.parts, share * width) }))
      .filter(({ y }) => y !== null && y >= 0 && y <= tall);
    let shown = found.filter(({ path }) => !path.classList.contains("rest"));
    const nearest = pointerY === null ? null : found.sort((a, b) => Math.abs(a.y - pointerY) - Math.abs(b.y - pointerY))[0];
    for (const { path } of lines) path.classList.toggle("near", path === nearest?.path && path.classList.contains("rest"));
    if (nearest && nearest.path.classList.contains("rest")) shown = [nearest, ...shown];
    shown.sort((a, b) => a.y - b.y);
    const said = shown.map(({ arm, y }) => `${names[arm]} ${short(up(1 - y / tall))}`).join("  ·  ");
    readout.textContent = `${short(across(share))} ${plot.dataset.unit}:  ${said || "nothing here"}`;
  }
  function leave() {
    cursor.hidden = true;
    for (const { path } of lines ?? []) path.classList.remove("near");
  }
  plot.tabIndex = 0;
  plot.setAttribute("role", "group");
  plot.setAttribute("aria-label", `${plot.dataset.said}. Arrow keys read values.`);
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    look(((event.clientY - box.top) / box.height) * tall);
  });
  plot.addEventListener("pointerleave", leave);
  plot.addEventListener("blur", leave);
  plot.addEventListener("focus", () => plot.matches(":focus-visible") && look(null));
  plot.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: -0.02, ArrowRight: 0.02, Home: -1, End: 1 };
    if (!(event.key in steps)) return;
    share = Math.min(1, Math.max(0, share + steps[event.key]));
    look(null);
    event.preventDefault();
  });
}

for (const figure of document.querySelectorAll(".parallel")) {
  const readout = figure.querySelector(".readout");
  const box = figure.querySelector(".scroll");
  const paths = [...figure.querySelectorAll("path[data-rank]")].sort((a, b) => a.dataset.rank - b.dataset.rank);
  let rank = -1;
  function look(path) {
    for (const other of paths) other.classList.toggle("near", other === path);
    rank = paths.indexOf(path);
    readout.textContent = path ? `${rank + 1} of ${paths.length}: ${path.dataset.said}` : "";
  }
  box.setAttribute("aria-label", "Values of the runs. Up and down go from the best to the worst.");
  box.addEventListener("keydown", (event) => {
    const steps = { ArrowUp: -1, ArrowDown: 1 };
    if (!(event.key in steps)) return;
    look(paths[Math.min(paths.length - 1, Math.max(0, rank + steps[event.key]))]);
    event.preventDefault();
  });
  box.addEventListener("pointermove", (event) => {
    const svg = figure.querySelector("svg").getBoundingClientRect();
    const [, , width, tall] = figure.querySelector("svg").getAttribute("viewBox").split(" ").map(Number);
    const [x, y] = [((event.clientX - svg.left) / svg.width) * width, ((event.clientY - svg.top) / svg.height) * tall];
    const away = (path) => {
      const at = path.getAttribute("d").slice(1).split("L").map((pair) => pair.split(",").map(Number));
      const next = Math.max(1, at.findIndex((point) => point[0] >= x));
      if (next >= at.length) return Infinity;
      const [[x0, y0], [x1, y1]] = [at[next - 1], at[next]];
      return Math.abs(y0 + ((x - x0) / (x1 - x0)) * (y1 - y0) - y);
    };
    const nearest = paths.reduce((best, path) => (away(path) < away(best) ? path : best), paths[0]);
    look(away(nearest) < tall / 15 ? nearest : null);
  });
}
