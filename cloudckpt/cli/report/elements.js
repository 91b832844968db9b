// Elements, and numbers as people read them. Names of others enter as text nodes and attributes, never as HTML.

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== undefined && child !== null));
  return made;
}

// A text that may be written from right to left, or hold marks that would turn what stands beside it.
function name(text) {
  return element("bdi", { class: "name" }, text);
}

function section(id, title, ...children) {
  const heading = element("h2", { id: `${id}-title` }, title);
  return element("section", { id, "aria-labelledby": `${id}-title` }, heading, ...children);
}

function size(nbytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let unit = 0;
  while (nbytes >= 1024 && unit < units.length - 1) {
    nbytes /= 1024;
    unit += 1;
  }
  return `${unit ? nbytes.toFixed(1) : nbytes} ${units[unit]}`;
}

function count(number, one, many = `${one}s`) {
  return `${number.toLocaleString("en")} ${number === 1 ? one : many}`;
}

function short(number) {
  const units = ["", " K", " M", " B", " T"];
  let unit = 0;
  while (number >= 999.5 && unit < units.length - 1) {
    number /= 1000;
    unit += 1;
  }
  return `${unit ? number.toPrecision(3) : number}${units[unit]}`;
}

function share(part, whole) {
  const percent = whole ? (100 * part) / whole : 0;
  return `${percent >= 10 || percent === 0 ? percent.toFixed(0) : percent.toFixed(percent >= 0.1 ? 1 : 2)} %`;
}

function seconds(value) {
  if (value >= 100) return `${value.toFixed(0)} s`;
  if (value >= 1) return `${value.toFixed(2)} s`;
  return value >= 0.001 ? `${(1000 * value).toFixed(0)} ms` : `${(1000 * value).toFixed(2)} ms`;
}

function shape(sizes) {
  return sizes.length ? sizes.join(" × ") : "scalar";
}

function place(made, box) {
  for (const [side, value] of Object.entries(box)) made.style.setProperty(side, `${value}%`);
  return made;
}

function moment(text) {
  const when = new Date(text);
  const shown = `${when.toISOString().slice(0, 10)} ${when.toISOString().slice(11, 19)} UTC`;
  return element("time", { datetime: text }, shown);
}
