// What changed: shares of the bytes, and the entries that are not as they were.

const KINDS = ["new", "other bytes", "another shape", "another dtype", "another kind", "another value", "gone", "not known", "the same"];

function changes({ since, created, counts, nbytes, rows }) {
  const shown = KINDS.filter((kind) => counts[kind]);
  const drawn = shown.filter((kind) => kind !== "gone" && nbytes[kind]);
  const whole = drawn.reduce((sum, kind) => sum + nbytes[kind], 0);
  const kindOf = (kind) => `c${KINDS.indexOf(kind)}`;
  const parts = drawn.map((kind) => place(element("i", { class: kindOf(kind) }), { width: (100 * nbytes[kind]) / whole }));
  const keys = shown.map((kind) =>
    element("li", {}, element("i", { class: kindOf(kind) }), element("b", {}, kind), ` ${count(counts[kind], "entry", "entries")}`, nbytes[kind] ? `, ${size(nbytes[kind])}` : ""),
  );
  const facts = element("p", { class: "facts" }, element("span", {}, "since ", element("code", {}, name(since))), created ? element("span", {}, "saved ", moment(created)) : undefined);
  const total = shown.reduce((sum, kind) => sum + (kind === "the same" || kind === "not known" ? 0 : counts[kind]), 0);
  const summary = `${count(total, "entry", "entries")} that are not as they were${total > rows.length ? `, the ${rows.length} largest` : ""}`;
  const made = table("Entries that are not as they were", [
    column("key", (row) => row.key, (row) => name(row.key)),
    column("", (row) => row.what),
    column("before", (row) => row.before, (row) => name(row.before)),
    column("after", (row) => row.after, (row) => name(row.after)),
    numbers("bytes", (row) => row.nbytes, size),
  ], rows);
  const hint = counts["not known"] ? "Manifests do not tell of what is transformed, or cut otherwise; cloudckpt diff reads it." : "Told by manifests alone; cloudckpt diff compares values.";
  return section(
    "changes",
    "What changed",
    facts,
    element("div", { class: "split", "aria-hidden": true }, ...parts),
    element("ul", { class: "legend" }, ...keys),
    rows.length ? folded(summary, made) : undefined,
    element("p", { class: "quiet hint" }, hint),
  );
}
