// The page: what the data says, from the top to the bottom.

const data = JSON.parse(document.getElementById("data").textContent);

function card(title, value, ...more) {
  const small = more.filter(Boolean).map((text) => element("small", {}, text));
  return element("div", { class: "card" }, element("dt", {}, title), element("dd", {}, value, ...small));
}

function cards({ summary, totals }) {
  const stored = summary && summary.stored_nbytes;
  const shown = [
    summary && summary.step !== undefined && summary.step !== null && card("step", summary.step.toLocaleString("en")),
    card("parameters", short(totals.parameter_count), count(totals.tensor_count, "tensor")),
    card("size", size(totals.nbytes), count(totals.entry_count, "entry", "entries")),
    stored && card("stored", size(stored), stored < totals.nbytes && `${share(stored, totals.nbytes)} of the size`),
    card("shards", totals.object_count.toLocaleString("en"), count(totals.chunk_count, "chunk")),
  ];
  return element("dl", { class: "cards" }, ...shown.filter(Boolean));
}

function facts({ totals, extensions }) {
  const shown = Object.entries(totals.dtypes).map(([dtype, part]) => element("span", {}, `${dtype} ${share(part, totals.nbytes)}`));
  const chain = extensions.length ? element("span", {}, `through ${extensions.join(", ")}`) : undefined;
  return element("p", { class: "facts" }, ...shown, chain);
}

function metrics(found) {
  const entries = Object.entries(found ?? {});
  if (!entries.length) return undefined;
  const pairs = entries.map(([key, value]) => element("div", {}, element("dt", {}, name(key)), element("dd", { title: String(value) }, String(Number(value.toPrecision(6))))));
  return element("dl", { class: "metrics", "aria-label": "Metrics" }, ...pairs);
}

function metadata(text) {
  if (text === null || text === undefined) return element("p", { class: "quiet" }, "Its metadata is encrypted.");
  return text === "{}" ? undefined : folded("metadata", element("pre", {}, name(text)));
}

function head({ url, format, summary }) {
  const parts = url.split("/");
  const wordmark = element("p", { class: "wordmark" }, "cloudckpt");
  const title = element("h1", {}, name(parts[parts.length - 1]));
  const said = [summary ? element("span", {}, "saved ", moment(summary.created)) : undefined];
  said.push(element("span", {}, summary ? `by ${summary.writer}` : `written by ${format}`));
  return [wordmark, title, element("p", { class: "url" }, name(url)), element("p", { class: "facts" }, ...said.filter(Boolean))];
}

document.getElementById("head").append(...head(data));
document.getElementById("main").append(
  ...[
    section("summary", "Summary", cards(data), facts(data), metrics(data.summary?.metrics), metadata(data.metadata), data.shards.length ? shards(data.shards, data.totals) : undefined),
    treemap(data.views),
    timelines(data.timelines),
    data.changes && changes(data.changes),
    data.tensors.length ? tensors(data.tensors, data.totals) : undefined,
    data.notes.length ? section("notes", "Left out", element("ul", {}, ...data.notes.map((note) => element("li", {}, name(note))))) : undefined,
  ].filter(Boolean),
);
document.getElementById("foot").append("made by ", data.made_by, ", ", moment(data.made));
