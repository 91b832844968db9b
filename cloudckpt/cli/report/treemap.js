// The treemap: areas are bytes. A click goes into what lies around a rectangle, the crumbs lead back.

const MOST_TILES = 400;
const LEAST_PIXELS = 700;
const LINE = 17;
const PADDING = 12;
const COLORS = 9;
const SHADES = 4;

function squarified(nodes, box) {
  // Bruls, Huizing and van Wijk, "Squarified Treemaps": rows along the shorter side, as near to squares as they get.
  const sorted = [...nodes].sort((a, b) => b.nbytes - a.nbytes);
  const total = sorted.reduce((sum, node) => sum + node.nbytes, 0);
  const scale = (box.w * box.h) / total;
  let { x, y, w, h } = box;
  const placed = [];
  for (let at = 0; at < sorted.length; ) {
    const side = Math.min(w, h);
    let stop = at;
    let area = 0;
    let worst = Infinity;
    while (stop < sorted.length) {
      const grown = area + sorted[stop].nbytes * scale;
      const [most, least] = [sorted[at].nbytes * scale, sorted[stop].nbytes * scale];
      const ratio = Math.max((side * side * most) / (grown * grown), (grown * grown) / (side * side * least));
      if (ratio > worst) break;
      [worst, area, stop] = [ratio, grown, stop + 1];
    }
    const thick = area / side;
    const isTall = w >= h;
    for (let along = 0; at < stop; at += 1) {
      const long = (sorted[at].nbytes * scale) / thick;
      const where = isTall ? { x, y: y + along, w: thick, h: long } : { x: x + along, y, w: long, h: thick };
      placed.push({ node: sorted[at], ...where });
      along += long;
    }
    if (isTall) [x, w] = [x + thick, w - thick];
    else [y, h] = [y + thick, h - thick];
  }
  return placed;
}

const pen = document.createElement("canvas").getContext("2d");

function widthOf(text, font) {
  pen.font = `${font} ${getComputedStyle(document.body).fontFamily}`;
  return pen.measureText(text).width;
}

// What stands in a box. A shard's own name is random, and its beginning is enough.
function title(node) {
  const last = node.kind === "shard" ? node.name.split("/").pop() : node.name;
  return last.replace(/^([0-9a-f]{8})[0-9a-f]{24}\.(safetensors|frames)$/, "$1…");
}

// Where the name of a box can be read: below the names of the boxes around it; undefined where there is no room.
function nameAt(box, around) {
  const isTop = box.depth === 1;
  const text = PADDING + widthOf(title(box.node), isTop ? "650 12.5px" : "11px");
  const long = isTop ? text + PADDING + widthOf(size(box.node.nbytes), "12.5px") : text;
  let top = box.y;
  for (const other of [...around].sort((a, b) => a.y - b.y)) {
    const isBeside = box.x >= other.x + other.w || box.x + Math.min(box.w, long) <= other.x;
    if (!isBeside && top < other.y + LINE && top + LINE > other.y) top = other.y + LINE;
  }
  const isLarge = isTop || (box.w > 60 && box.h > 2 * LINE) || box.depth === 2;
  const fits = box.w > (isTop ? 60 : 0.85 * text) && box.y + box.h - top > LINE;
  return isLarge && fits ? { x: box.x, y: top, w: Math.min(box.w, long) } : undefined;
}

// What is drawn of a node: tiles that cover it, and frames around those that were opened.
function laidOut(root, width, height) {
  const placed = (box, around) => ({ ...box, around, named: nameAt(box, around) });
  const tops = squarified(root.children, { x: 0, y: 0, w: width, h: height });
  const forksOf = ({ node }) => (node.nbytes > 0.95 * root.nbytes ? 0 : 1); // what is nearly all has the colors of its parts
  const open = tops.map((box, top) => placed({ ...box, top, hue: top, shade: 0, depth: 1, forks: forksOf(box) }, []));
  const [closed, frames] = [[], []];
  while (open.length && open.length + closed.length < MOST_TILES) {
    const at = open.reduce((best, box, index) => (box.node.nbytes > open[best].node.nbytes ? index : best), 0);
    const [box] = open.splice(at, 1);
    const { node, top, depth } = box;
    if (!node.children || box.w * box.h < LEAST_PIXELS) {
      closed.push(box);
      continue;
    }
    frames.push(box);
    const around = box.named ? [...box.around, box.named] : box.around;
    const forks = box.forks + (node.children.length > 1 ? 1 : 0);
    squarified(node.children, box).forEach((inner, index) => {
      const hue = forks === 1 && box.forks === 0 ? index : box.hue;
      const shade = forks > box.forks && forks > 1 && forks < 5 ? (box.shade + index) % SHADES : box.shade;
      open.push(placed({ ...inner, top, hue, shade, depth: depth + 1, forks }, around));
    });
  }
  const tiles = [...closed, ...open].sort((a, b) => a.top - b.top || b.node.nbytes - a.node.nbytes);
  return { tiles, frames, tops: tops.map((box) => box.node) };
}

function described(node, whole) {
  const facts = [];
  if (node.dtype) facts.push(node.dtype, shape(node.shape));
  else if (node.kind !== "bytes") facts.push(count(node.count ?? 1, "entry", "entries"));
  facts.push(size(node.nbytes), share(node.nbytes, whole));
  return facts;
}

function label(box) {
  if (!box.named) return undefined;
  const made = element("span", { class: box.depth === 1 ? "label top" : "label" }, name(title(box.node)));
  if (box.depth === 1) made.append(element("span", { class: "size" }, size(box.node.nbytes)));
  made.style.setProperty("top", `${box.named.y - box.y + 2}px`);
  return made;
}

function treemap(views) {
  const whole = views.module.nbytes;
  let [view, trail] = ["module", [views.module]];
  const crumbs = element("nav", { class: "crumbs", "aria-label": "Where in the checkpoint" });
  const map = element("div", { class: "map", id: "map", role: "group", "aria-label": "Treemap: areas are bytes" });
  const told = element("p", { class: "told", role: "status" });
  const here = () => trail[trail.length - 1];

  function tell(node) {
    const path = node.kind === "more" ? `${node.name}${node.path ? ` in ${node.path}` : ""}, small ones` : node.path || node.name;
    told.replaceChildren(name(path || "the whole checkpoint"), ...described(node, whole).map((fact) => element("span", {}, fact)));
  }

  function go(to, isFocused) {
    trail = to;
    draw();
    tell(here());
    if (isFocused) map.querySelector(".tile")?.focus();
  }

  function into(box, tops, isFocused) {
    const node = tops[box.top];
    if (node.children) go([...trail, node], isFocused);
    else tell(box.node);
  }

  function tile(box, tops, number) {
    const attributes = {
      type: "button",
      class: `tile ${box.node.kind === "more" ? "more" : `k${box.hue % COLORS}`} s${box.shade}`,
      tabindex: number ? -1 : 0,
      "aria-label": [box.node.path || box.node.name, ...described(box.node, whole)].join(", "),
      "data-nbytes": box.node.nbytes,
      "data-path": box.node.path ?? "",
    };
    const made = element("button", attributes, label(box));
    made.addEventListener("click", (event) => into(box, tops, event.detail === 0));
    made.addEventListener("pointerenter", () => tell(box.node));
    made.addEventListener("focus", () => tell(box.node));
    return made;
  }

  function frame(box) {
    const attributes = { class: `frame k${box.hue % COLORS} s${box.shade} d${Math.min(box.depth, 3)}`, "aria-hidden": true };
    return element("div", attributes, label(box));
  }

  function draw() {
    const [width, height] = [map.clientWidth, map.clientHeight];
    const at = (box) => ({
      left: (100 * box.x) / width,
      top: (100 * box.y) / height,
      width: (100 * box.w) / width,
      height: (100 * box.h) / height,
    });
    crumbs.replaceChildren(...trail.map(crumb));
    map.classList.toggle("empty", !here().children);
    if (!here().children) {
      map.replaceChildren(element("p", { class: "quiet" }, "Nothing here has bytes of its own."));
      return;
    }
    const { tiles, frames, tops } = laidOut(here(), width, height);
    map.replaceChildren(
      ...tiles.map((box, number) => place(tile(box, tops, number), at(box))),
      ...frames.map((box) => place(frame(box), at(box))),
    );
  }

  function crumb(node, depth) {
    const text = depth ? title(node) : "checkpoint";
    if (depth === trail.length - 1) return element("span", { "aria-current": "true" }, name(text));
    const made = element("button", { type: "button" }, name(text));
    made.addEventListener("click", () => go(trail.slice(0, depth + 1)));
    return made;
  }

  function move(event) {
    const tiles = [...map.querySelectorAll(".tile")];
    const at = tiles.indexOf(document.activeElement);
    const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: tiles.length - 1 };
    if (event.key === "Escape" && trail.length > 1) go(trail.slice(0, -1), true);
    else if (at >= 0 && tiles[to[event.key]]) {
      tiles[at].tabIndex = -1;
      tiles[to[event.key]].tabIndex = 0;
      tiles[to[event.key]].focus();
      event.preventDefault();
    }
  }

  function choice(kind) {
    const input = element("input", { type: "radio", name: "view", value: kind, checked: kind === view });
    input.addEventListener("change", () => {
      view = kind;
      go([views[view]]);
    });
    return element("label", {}, input, element("span", {}, `by ${kind}`));
  }

  map.addEventListener("keydown", move);
  map.addEventListener("pointerleave", () => tell(here()));
  const choices = ["module", "dtype", "shard"].map(choice);
  const switches = element("fieldset", { class: "switch" }, element("legend", { class: "hidden" }, "Grouped"), ...choices);
  const hint = element("p", { class: "quiet hint" }, "Areas are bytes. Click, or Enter, goes into a group; Escape leads back; arrow keys move.");
  let drawn = 0;
  new ResizeObserver(() => {
    if (map.clientWidth === drawn) return;
    drawn = map.clientWidth;
    go(trail);
  }).observe(map);
  return section("tree", "What it is made of", element("div", { class: "bar" }, crumbs, switches), map, told, hint);
}
