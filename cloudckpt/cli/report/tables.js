// Tables, sorted by a click on a title.

// A column: title, value to sort by, and what is shown of it.
function table(caption, columns, rows) {
  const body = element("tbody");
  const heads = columns.map((column) => {
    const button = element("button", { type: "button" }, column.title);
    return element("th", { scope: "col", class: column.isNumber && "number" }, button);
  });

  function sort(index, isRising) {
    const { value } = columns[index];
    const order = (a, b) => (value(a) < value(b) ? -1 : value(a) > value(b) ? 1 : 0);
    const sorted = [...rows].sort((a, b) => (isRising ? order(a, b) : order(b, a)));
    body.replaceChildren(...sorted.map(rowOf));
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    heads[index].setAttribute("aria-sort", isRising ? "ascending" : "descending");
  }

  function rowOf(row) {
    return element("tr", {}, ...columns.map((column) => element("td", { class: column.isNumber && "number" }, column.show(row))));
  }

  heads.forEach((head, index) => {
    const first = columns[index].isNumber ? "descending" : "ascending";
    head.firstChild.addEventListener("click", () => {
      const was = head.getAttribute("aria-sort");
      sort(index, was ? was === "descending" : first === "ascending");
    });
  });
  body.append(...rows.map(rowOf));
  const made = element("table", {}, element("caption", { class: "hidden" }, caption), element("thead", {}, element("tr", {}, ...heads)), body);
  return element("div", { class: "wide", role: "region", "aria-label": caption, tabindex: 0 }, made);
}

function column(title, value, show = (row) => value(row)) {
  return { title, value, show };
}

function numbers(title, value, show = (number) => number.toLocaleString("en")) {
  return { title, value, show: (row) => show(value(row)), isNumber: true };
}

function folded(summary, ...children) {
  return element("details", {}, element("summary", {}, summary), ...children);
}

function tensors(rows, totals) {
  const made = table("The largest tensors", [
    column("key", (row) => row.key, (row) => name(row.key)),
    column("dtype", (row) => row.dtype),
    column("shape", (row) => row.shape.join(), (row) => shape(row.shape)),
    numbers("parameters", (row) => row.parameter_count),
    numbers("bytes", (row) => row.nbytes, size),
    numbers("share", (row) => row.nbytes / (totals.nbytes || 1), (part) => share(part, 1)),
    numbers("chunks", (row) => row.chunk_count),
  ], rows);
  const rest = totals.tensor_count - rows.length;
  const hint = rest > 0 ? `and ${count(rest, "smaller one")}; all are listed by cloudckpt inspect` : "";
  return section("largest", "The largest tensors", made, hint && element("p", { class: "quiet hint" }, hint));
}

function shards(rows, totals) {
  const made = table("Shards", [
    column("object", (row) => row.key, (row) => name(row.key)),
    numbers("plain bytes", (row) => row.nbytes, size),
    numbers("stored bytes", (row) => row.size ?? 0, (stored) => (stored ? size(stored) : "–")),
    column("extensions", (row) => row.extensions.join(), (row) => row.extensions.join(", ") || "none"),
  ], rows);
  const rest = totals.object_count - rows.length;
  return folded(count(totals.object_count, "shard"), made, rest > 0 ? element("p", { class: "quiet" }, `and ${count(rest, "smaller one")}`) : "");
}
