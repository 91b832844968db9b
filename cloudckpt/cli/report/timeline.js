// Saves and loads over time: a group of rows for each rank, a row for each kind of work.

function ticks(span) {
  const rough = span / 6;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * unit).find((size) => size >= rough);
  return Array.from({ length: Math.floor(span / step) + 1 }, (_, number) => number * step);
}

function rate(nbytes, busy) {
  return busy > 0 ? `${size(nbytes / busy)}/s` : "";
}

function timeline(line) {
  const span = line.span_s || 1e-6;
  const note = "Point at a bar, or step through the rows with Tab. Times are of each host's own clock.";
  const told = element("p", { class: "told", role: "status" }, element("span", {}, note));
  const tell = (...facts) => told.replaceChildren(...facts.filter(Boolean).map((fact) => element("span", {}, fact)));

  function bar(rank, row, work) {
    const made = element("div", { class: `work p-${row.phase}` });
    const took = work.stop_s - work.start_s;
    made.addEventListener("pointerenter", () =>
      tell(
        `rank ${rank.rank}`,
        row.phase,
        `${seconds(work.start_s)} to ${seconds(work.stop_s)}`,
        work.count > 1 && count(work.count, "event"),
        work.nbytes && size(work.nbytes),
        work.nbytes && rate(work.nbytes, took),
      ),
    );
    return place(made, { left: (100 * work.start_s) / span, width: (100 * took) / span });
  }

  function rowOf(rank, row) {
    const facts = [seconds(row.busy_s), count(row.count, "event"), row.nbytes && size(row.nbytes), row.nbytes && rate(row.nbytes, row.busy_s)];
    const track = element("div", { class: "track", tabindex: 0, role: "img" });
    track.setAttribute("aria-label", [`rank ${rank.rank}`, row.phase, ...facts.filter(Boolean)].join(", "));
    track.addEventListener("focus", () => tell(`rank ${rank.rank}`, row.phase, ...facts));
    for (const lane of row.lanes) track.append(element("div", { class: "lane" }, ...lane.map((work) => bar(rank, row, work))));
    track.classList.toggle("dense", row.lanes.length > 3);
    return [element("div", { class: "phase" }, name(row.phase)), track];
  }

  function rankOf(rank) {
    const facts = [rank.host && name(rank.host), seconds(rank.stop_s), rank.nbytes && size(rank.nbytes)].filter(Boolean);
    const head = element("h4", {}, `rank ${rank.rank}`, ...facts.map((fact) => element("span", {}, fact)));
    return [head, ...rank.rows.flatMap((row) => rowOf(rank, row))];
  }

  const marks = ticks(span).map((at) => place(element("span", {}, at ? seconds(at) : "0"), { left: (100 * at) / span }));
  const axis = element("div", { class: "axis", "aria-hidden": true }, ...marks);
  const lines = ticks(span).map((at) => place(element("i", {}), { left: (100 * at) / span }));
  const grid = element("div", { class: "grid", "aria-hidden": true }, ...lines);
  const title = element("h3", {}, line.kind === "save" ? "Save" : "Load", element("span", {}, moment(line.began)));
  if (line.error) title.append(element("span", { class: "failed" }, `failed: ${line.error}`));
  title.append(element("span", {}, seconds(line.span_s)), element("span", {}, count(line.world_size, "rank")));
  const rows = element("div", { class: "rows" }, grid, ...line.ranks.flatMap(rankOf), axis);
  const some = line.left < line.world_size ? `Only ${line.left} of ${line.world_size} ranks left a trace. ` : "";
  const fewer = line.ranks.length < line.left ? `Shown are the ${line.ranks.length} ranks that ended last, and the first. ` : "";
  const hint = some || fewer ? element("p", { class: "quiet hint" }, some + fewer) : undefined;
  return element("article", { class: "timeline", id: `timeline-${line.kind}` }, title, rows, told, hint);
}

function timelines(lines) {
  const title = "How it was saved and loaded";
  if (lines && lines.length) return section("times", title, ...lines.map(timeline));
  const how = element("p", { class: "quiet" }, lines ? "The traces tell of no work. " : "No trace was given. ");
  how.append("Saves leave one for each rank with ", element("code", {}, "WriteOptions(trace=PLACE)"), ", loads with ");
  how.append(element("code", {}, "ReadOptions(trace=PLACE)"), "; then make this report with ", element("code", {}, "--trace PLACE"), ".");
  return section("times", title, how);
}
