// What draws a report. All it knows is the JSON in the page. What came out of a checkpoint becomes text nodes, or labels on
// a canvas, and never markup.
"use strict";
(() => {
  const facts = JSON.parse(document.getElementById("facts").textContent);
  const $ = (selector) => document.querySelector(selector);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const SEVERITY = {
    unreadable: "bad", NaN: "bad", infinite: "bad", far: "odd", "unlike peers": "odd", zero: "note", constant: "note",
  };
  const RANK = { bad: 0, odd: 1, note: 2 };
  const PALETTE = [
    "#00897b", "#5c6bc0", "#ef8a3c", "#8e63b8", "#3f9dd8", "#c2557e", "#7f9c3a", "#a1785c", "#5f7d8c", "#c9a227",
  ];

  // ---------------------------------------------------------------- words and numbers

  function el(tag, properties = {}, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children.filter((child) => child !== null && child !== undefined));
    return made;
  }
  const count = (n) => n.toLocaleString("en");
  const counted = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;
  function scaled(n, units) {
    let at = 0;
    while (n >= 999.5 && at < units.length - 1) { n /= 1000; at += 1; }
    return (at ? Number(n.toPrecision(3)) : Math.round(n)) + units[at];
  }
  const bytes = (n) => scaled(n, [" B", " kB", " MB", " GB", " TB"]);
  const amount = (n) => scaled(n, ["", " k", " M", " G", " T"]);
  const number = (x) => (x === null ? "" : x === 0 ? "0" : Math.abs(x) < 1e-2 || Math.abs(x) >= 1e6
    ? x.toExponential(2) : String(Number(x.toPrecision(3))));
  const dims = (shape) => `[${shape.join(", ")}]`;

  // ---------------------------------------------------------------- rows

  const flagged = new Map();
  for (const [name, kind, text] of facts.flags) {
    flagged.set(name, [...(flagged.get(name) || []), { kind, text }]);
  }
  const rank = (flags) => Math.min(9, ...flags.map((flag) => RANK[SEVERITY[flag.kind]]));
  const NUMBERS = ["seen", "nans", "infinities", "zeros", "least", "most", "mean", "deviation", "norm", "bins"];
  const rows = facts.tensors.map(([name, dtype, shape, numel, nbytes, storage, values, more], index) => {
    const flags = flagged.get(name) || [];
    const numbers = values && Object.fromEntries(NUMBERS.map((key, at) => [key, values[at]]));
    return { index, name, dtype, shape, numel, nbytes, storage, more, numbers, flags, rank: rank(flags) };
  });
  const byName = new Map(rows.map((row) => [row.name, row]));
  const sharing = new Map();
  for (const row of rows) {
    if (row.storage >= 0) sharing.set(row.storage, [...(sharing.get(row.storage) || []), row]);
  }
  // Shared memory counts once, for the largest that is of it.
  for (const row of rows) {
    const largest = row.storage < 0 ? row : sharing.get(row.storage).reduce((a, b) => (b.nbytes > a.nbytes ? b : a));
    row.stored = largest === row ? row.nbytes : 0;
  }

  // ---------------------------------------------------------------- charts

  const charts = [];
  function ink() {
    const style = getComputedStyle(document.documentElement);
    return (name) => style.getPropertyValue(`--${name}`).trim();
  }
  function chart(host, option) {
    const made = echarts.init(host, null, { renderer: "canvas" });
    const draw = () => made.setOption({ animation: false, ...option(ink()) }, true);
    draw();
    new ResizeObserver(() => made.resize()).observe(host);
    charts.push(draw);
    return { made, draw };
  }
  dark.addEventListener("change", () => charts.forEach((draw) => draw()));

  // A tooltip is made of elements: what ECharts makes of a string is markup.
  const tip = (...lines) => el("div", {}, ...lines.map((line) => el("div", { textContent: line })));
  const tooltip = (of, colour) => ({
    confine: true, formatter: of, backgroundColor: colour("card"), borderColor: colour("line"),
    textStyle: { color: colour("ink"), fontSize: 12 }, extraCssText: "max-width:460px;white-space:normal;overflow-wrap:anywhere",
  });
  const axis = (colour, more) => ({
    axisLine: { lineStyle: { color: colour("line") } }, axisTick: { show: false },
    axisLabel: { color: colour("soft"), fontSize: 11 }, splitLine: { lineStyle: { color: colour("line") } }, ...more,
  });

  const dtypes = [...new Set(rows.map((row) => row.dtype))].map((name) => {
    const own = rows.filter((row) => row.dtype === name);
    return { name, tensors: own.length, nbytes: own.reduce((sum, row) => sum + row.stored, 0) };
  }).sort((a, b) => b.nbytes - a.nbytes || (a.name < b.name ? -1 : 1));
  const colourOf = {
    dtype: (row) => PALETTE[dtypes.findIndex((each) => each.name === row.dtype) % PALETTE.length],
    flag: (row, colour) => colour(["bad", "odd", "soft"][row.rank] || "good"),
  };

  // A tree by the dots in names; where a module has a single child the two are one area.
  function tree(colour) {
    const by = $("#colour").value;
    const root = { children: new Map(), nbytes: 0 };
    for (const row of rows) {
      if (!row.stored) continue;
      let place = root;
      const path = row.name.split(".");
      for (const name of path.slice(0, -1)) {
        place.nbytes += row.stored;
        if (!place.children.has(name)) place.children.set(name, { children: new Map(), nbytes: 0 });
        place = place.children.get(name);
      }
      place.nbytes += row.stored;
      place.children.set(`${path[path.length - 1]}\n`, { row, nbytes: row.stored }); // a name of a tensor is none of a module
    }
    const areas = (place, names, tone) => [...place.children].map(([key, child], at) => {
      let name = key.trimEnd();
      const path = [...names, name];
      while (child.children && child.children.size === 1) {
        const [[only, inner]] = child.children;
        name += `.${only.trimEnd()}`;
        path.push(only.trimEnd());
        child = inner;
      }
      const own = by === "module" ? tone || PALETTE[at % PALETTE.length] : undefined;
      if (child.row) {
        const paint = by === "module" ? own : colourOf[by](child.row, colour);
        return { name, path, value: child.row.stored, row: child.row, itemStyle: { color: paint } };
      }
      // A module that is most of all there is leaves it to those in it to be told apart.
      const children = areas(child, path, child.nbytes < root.nbytes / 2 ? own : undefined);
      return { name, path, children, value: child.nbytes, itemStyle: { color: own } };
    });
    let top = root;
    const names = [];
    while (top.children && top.children.size === 1 && [...top.children.values()][0].children) {
      const [[only, inner]] = top.children;
      names.push(only);
      top = inner;
    }
    return { name: names.join(".") || "all", children: areas(top, names) };
  }

  const map = chart($("#map"), (colour) => {
    const all = tree(colour);
    const label = { show: true, fontSize: 11, overflow: "truncate", color: "#fff" };
    const level = (gapWidth, borderColor) => ({
      itemStyle: { gapWidth, borderWidth: gapWidth ? 1 : 0, borderColor },
      upperLabel: { show: true, height: 18, color: colour("ink"), fontSize: 11, backgroundColor: "transparent" },
    });
    return {
      tooltip: tooltip(({ data, value }) => (data && data.path ? tip(
        data.path.join("."),
        data.row ? `${data.row.dtype} ${dims(data.row.shape)}, ${bytes(value)}` : bytes(value),
        ...(data.row ? data.row.flags.map((flag) => `${flag.kind}: ${flag.text}`) : []),
      ) : tip(bytes(value))), colour),
      series: [{
        type: "treemap", name: all.name, data: all.children, left: 0, right: 0, top: 0, bottom: 30,
        roam: false, nodeClick: "zoomToNode", leafDepth: rows.length > 3000 ? 3 : 4, visibleMin: 60, childrenVisibleMin: 400,
        drillDownIcon: "", label, levels: [level(2, colour("card")), level(2, colour("line")), level(1, colour("line")), level(1, colour("line"))],
        breadcrumb: {
          bottom: 0, left: 0, height: 22, itemStyle: { color: colour("hover"), borderColor: colour("line"), textStyle: { color: colour("ink") } },
        },
      }],
    };
  });
  map.made.on("click", ({ data }) => { if (data && data.row) choose(data.row, true); });
  $("#colour").addEventListener("change", map.draw);

  const bars = chart($("#dtypes"), (colour) => ({
    grid: { left: 8, right: 70, top: 4, bottom: 4, containLabel: true },
    tooltip: tooltip(({ data }) => tip(`${data.name}: ${counted(data.tensors, "tensor")}, ${bytes(data.value)}`), colour),
    xAxis: axis(colour, { type: "value", show: false }),
    yAxis: axis(colour, { type: "category", inverse: true, data: dtypes.map((each) => each.name), axisLine: { show: false } }),
    series: [{
      type: "bar", barMaxWidth: 22,
      data: dtypes.map((each, at) => ({
        name: each.name, value: each.nbytes, tensors: each.tensors,
        itemStyle: { color: PALETTE[at % PALETTE.length], borderRadius: 3 },
      })),
      label: { show: true, position: "right", color: colour("soft"), formatter: ({ value }) => bytes(value) },
    }],
  }));
  bars.made.on("click", ({ data }) => { $("#search").value = data.name; filter(); });

  const powers = new Map();
  for (const row of rows) {
    const power = row.nbytes ? Math.floor(Math.log2(row.nbytes) / 2) * 2 : -2; // a bar for each factor of four
    const bar = powers.get(power) || { tensors: 0, nbytes: 0 };
    powers.set(power, { tensors: bar.tensors + 1, nbytes: bar.nbytes + row.stored });
  }
  const binary = (power) => (power < 0 ? "0" : `${2 ** (power % 10)} ${["B", "KiB", "MiB", "GiB", "TiB", "PiB"][Math.floor(power / 10)]}`);
  const steps = [];
  if (powers.size) {
    for (let power = Math.min(...powers.keys()); power <= Math.max(...powers.keys()); power += 2) steps.push(power);
  }
  chart($("#sizes"), (colour) => ({
    grid: { left: 8, right: 8, top: 10, bottom: 4, containLabel: true },
    tooltip: tooltip(({ data }) => tip(
      data.power < 0 ? "no bytes" : `${binary(data.power)} to ${binary(data.power + 2)}`, counted(data.value, "tensor"), bytes(data.nbytes),
    ), colour),
    xAxis: axis(colour, { type: "category", data: steps.map(binary), splitLine: { show: false } }),
    yAxis: axis(colour, { type: "value", minInterval: 1 }),
    series: [{
      type: "bar", barCategoryGap: "12%", itemStyle: { color: colour("accent"), borderRadius: [3, 3, 0, 0] },
      data: steps.map((power) => {
        const { tensors, nbytes } = powers.get(power) || { tensors: 0, nbytes: 0 };
        return { value: tensors, power, nbytes };
      }),
    }],
  }));

  // ---------------------------------------------------------------- tables

  // Only the rows that can be seen are elements: a checkpoint may have a hundred thousand.
  class Table {
    constructor(host, columns, chosen) {
      this.host = host;
      this.columns = columns;
      this.chosen = chosen;
      this.rows = [];
      this.shown = [];
      this.by = null;
      this.down = false;
      this.selected = null;
      this.heads = columns.map((column) => {
        const button = el("button", { type: "button", textContent: column.title, title: column.hint || "" });
        button.addEventListener("click", () => this.sort(column));
        const head = el("th", { scope: "col", className: column.number ? "number" : "" }, button);
        if (column.width) head.style.width = column.width;
        return head;
      });
      this.body = el("tbody");
      this.host.replaceChildren(el("table", {}, el("thead", {}, el("tr", {}, ...this.heads)), this.body));
      this.host.addEventListener("scroll", () => this.draw(true));
      new ResizeObserver(() => this.draw(true)).observe(this.host);
      this.body.addEventListener("click", (event) => {
        const line = event.target.closest("tr[data-row]");
        if (line && this.chosen) this.chosen(this.shown[Number(line.dataset.row)]);
      });
      this.host.addEventListener("keydown", (event) => {
        const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
        if (!step || !this.chosen || event.target.closest("button")) return;
        event.preventDefault();
        const next = this.shown[this.shown.indexOf(this.selected) + step];
        if (next) { this.chosen(next); this.reveal(next); }
      });
    }
    fill(rows) {
      this.rows = rows;
      this.host.scrollTop = 0;
      this.order();
    }
    sort(column) {
      this.down = this.by === column ? !this.down : Boolean(column.number);
      this.by = column;
      this.order();
    }
    order() {
      this.shown = [...this.rows];
      if (this.by) {
        const { value } = this.by;
        const sign = this.down ? -1 : 1;
        const missing = (x) => x === null || x === undefined || Number.isNaN(x);
        this.shown.sort((a, b) => {
          const [x, y] = [value(a), value(b)];
          if (missing(x) || missing(y)) return missing(x) - missing(y); // these come last, either way
          return (x < y ? -1 : x > y ? 1 : 0) * sign;
        });
      }
      this.columns.forEach((column, at) => {
        const is = column === this.by;
        this.heads[at].ariaSort = is ? (this.down ? "descending" : "ascending") : "none";
        this.heads[at].firstChild.textContent = column.title + (is ? (this.down ? " ▼" : " ▲") : "");
      });
      this.draw();
    }
    select(row) {
      this.selected = row;
      this.draw();
    }
    reveal(row) {
      const at = this.shown.indexOf(row);
      if (at < 0) return;
      const [top, height, room] = [at * Table.HEIGHT, Table.HEIGHT, this.host.clientHeight - 34];
      if (top < this.host.scrollTop) this.host.scrollTop = top;
      else if (top + height > this.host.scrollTop + room) this.host.scrollTop = top + height - room;
    }
    draw(moved = false) {
      const first = Math.max(0, Math.floor(this.host.scrollTop / Table.HEIGHT / 10) * 10 - 10);
      const last = Math.min(this.shown.length, first + Math.ceil((this.host.clientHeight || 560) / Table.HEIGHT) + 20);
      if (moved && first === this.first && last === this.last) return; // else a click might lose the row it is on
      [this.first, this.last] = [first, last];
      const room = (lines) => {
        const cell = el("td", { colSpan: this.columns.length });
        cell.style.height = `${lines * Table.HEIGHT}px`;
        return el("tr", { className: "room" }, cell);
      };
      const lines = this.shown.slice(first, last).map((row, at) => {
        const line = el("tr", {}, ...this.columns.map((column) => {
          const made = (column.cell || column.value)(row);
          const cell = el("td", { className: column.name ? "name" : column.number ? "number" : "" });
          cell.append(made === null || made === undefined ? "" : made);
          return cell;
        }));
        line.dataset.row = first + at;
        line.ariaSelected = String(row === this.selected);
        return line;
      });
      this.body.replaceChildren(room(first), ...lines, room(this.shown.length - last));
      this.host.style.height = `${Math.min(560, this.shown.length * Table.HEIGHT + 36)}px`;
    }
  }
  Table.HEIGHT = 30; // of a row, with its border: report.css has the same

  function named(name) {
    const parts = name.split(".");
    const tail = parts.slice(-2).join(".");
    return el("span", { title: name }, el("i", { textContent: name.slice(0, name.length - tail.length) }), el("b", { textContent: tail }));
  }

  function sparkline({ bins }) {
    if (!bins.length) return "";
    const most = Math.sqrt(Math.max(...bins)); // the tails are what is looked for
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    svg.setAttribute("viewBox", `0 0 ${bins.length} 20`);
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("class", "bins");
    path.setAttribute("d", bins.map((n, at) => (n ? `M${at} 20v${-Math.max(1, 20 * Math.sqrt(n) / most).toFixed(1)}h.9V20z` : "")).join(""));
    svg.append(path);
    return svg;
  }

  const worst = (row) => row.flags.reduce((a, b) => (RANK[SEVERITY[b.kind]] < RANK[SEVERITY[a.kind]] ? b : a));
  const hasNumbers = rows.some((row) => row.numbers);
  const fact = (key) => (row) => (row.numbers ? row.numbers[key] : null);
  const numeric = (key, title, hint) => ({
    title, hint, number: true, width: "74px", value: fact(key), cell: (row) => number(fact(key)(row)),
  });
  const table = new Table($("#table"), [
    { title: "name", name: true, value: (row) => row.name, cell: (row) => named(row.name) },
    { title: "dtype", width: "76px", value: (row) => row.dtype },
    { title: "shape", width: "104px", hint: "sorted by elements", value: (row) => row.numel, cell: (row) => dims(row.shape) },
    { title: "bytes", width: "70px", number: true, value: (row) => row.nbytes, cell: (row) => bytes(row.nbytes) },
    ...(hasNumbers ? [
      numeric("least", "min"), numeric("most", "max"), numeric("mean", "mean"), numeric("deviation", "std"),
      { title: "values", width: "88px", hint: "sorted by the norm", value: fact("norm"), cell: (row) => row.numbers && sparkline(row.numbers) },
    ] : []),
    {
      title: "odd", width: "96px", value: (row) => (row.flags.length ? row.rank : null),
      cell: (row) => row.flags.length && el("span", {
        className: SEVERITY[worst(row).kind], title: row.flags.map((flag) => `${flag.kind}: ${flag.text}`).join("\n"),
        textContent: worst(row).kind + (row.flags.length > 1 ? ` +${row.flags.length - 1}` : ""),
      }) || "",
    },
  ], (row) => choose(row, false));

  // Words are looked for in names, dtypes and what is odd; one with a star is a whole name.
  let kindWanted = null;
  function filter() {
    const words = $("#search").value.toLowerCase().split(/\s+/).filter(Boolean).map((word) => {
      if (!word.includes("*")) return (row) => row.text.includes(word);
      const glob = new RegExp(`^${word.split("*").map((part) => part.replace(/[.+?^${}()|[\]\\]/g, "\\$&")).join(".*")}$`, "s");
      return (row) => glob.test(row.name.toLowerCase());
    });
    const only = $("#only").checked;
    const found = rows.filter((row) => (!only || row.flags.length)
      && (!kindWanted || row.flags.some((flag) => flag.kind === kindWanted)) && words.every((word) => word(row)));
    table.fill(found);
    $("#count").textContent = found.length === rows.length
      ? counted(rows.length, "tensor") : `${count(found.length)} of ${counted(rows.length, "tensor")}`;
  }
  for (const row of rows) {
    row.text = [row.name, row.dtype, dims(row.shape), ...row.flags.map((flag) => flag.kind)].join(" ").toLowerCase();
  }
  $("#search").addEventListener("input", filter);
  $("#only").addEventListener("change", filter);

  // ---------------------------------------------------------------- one tensor

  let histogram = null;
  function choose(row, scroll) {
    table.select(row);
    history.replaceState(null, "", `#${encodeURIComponent(row.name.toWellFormed ? row.name.toWellFormed() : row.name)}`);
    if (scroll) {
      if (!table.shown.includes(row)) {
        $("#search").value = "";
        $("#only").checked = false;
        press(null);
      }
      table.reveal(row);
      $("#tensors").scrollIntoView({ block: "nearest" });
    }
    if (histogram) {
      charts.splice(charts.indexOf(histogram.draw), 1);
      histogram.made.dispose();
      histogram = null;
    }
    const { numbers, more } = row;
    const list = el("dl");
    const line = (title, text) => { if (text) list.append(el("dt", { textContent: title }), el("dd", { textContent: text })); };
    line("dtype", row.dtype + (more.layout ? `, ${more.layout}` : ""));
    line("shape", dims(row.shape));
    line("elements", count(row.numel));
    line("bytes", count(row.nbytes));
    line("strides", more.strides && dims(more.strides));
    line("record", more.record && more.record + (more.offset ? `, from element ${count(more.offset)}` : ""));
    line("shares", row.storage >= 0 && sharing.get(row.storage).filter((each) => each !== row).slice(0, 8).map((each) => each.name).join(", "));
    line("device", more.device);
    line("class", more.class);
    line("is", ["is_parameter", "requires_grad", "is_conj", "is_neg"].filter((key) => more[key]).join(", "));
    if (numbers) {
      for (const [key, title] of [["least", "min"], ["most", "max"], ["mean", "mean"], ["deviation", "std"], ["norm", "norm"]]) {
        line(title, numbers[key] === null ? "" : String(numbers[key]));
      }
      for (const [key, title] of [["zeros", "zeros"], ["nans", "NaN"], ["infinities", "infinite"]]) {
        line(title, numbers[key] ? `${count(numbers[key])} (${Number((100 * numbers[key] / numbers.seen).toPrecision(3))} %)` : "");
      }
    }
    const flags = el("ul", { className: "flags" }, ...row.flags.map((flag) => el("li", { className: SEVERITY[flag.kind] },
      el("b", { textContent: flag.kind }), ` ${flag.text}`)));
    const host = el("div", { className: "chart" });
    const drawn = numbers && numbers.bins.length;
    $("#detail").replaceChildren(el("h3", { textContent: row.name }), flags, ...(drawn ? [host] : []), list);
    if (!drawn) return;
    const { least, most, bins } = numbers;
    const edge = (at) => number(least + (most - least) * (at / bins.length));
    histogram = chart(host, (colour) => ({
      grid: { left: 4, right: 10, top: 12, bottom: 2, containLabel: true },
      tooltip: tooltip(({ dataIndex, value }) => tip(`${edge(dataIndex)} to ${edge(dataIndex + 1)}`, counted(value, "element")), colour),
      xAxis: axis(colour, {
        type: "category", data: bins.map((_, at) => number(least + (most - least) * ((at + 0.5) / bins.length))), splitLine: { show: false },
        axisLabel: { color: colour("soft"), fontSize: 10, interval: 7, hideOverlap: true },
      }),
      yAxis: axis(colour, {
        type: "log", min: 0.5, logBase: 10,
        axisLabel: { color: colour("soft"), fontSize: 10, formatter: (n) => (n < 1 ? "" : amount(n)) },
      }),
      series: [{
        type: "bar", barCategoryGap: "8%", itemStyle: { color: colour("accent") }, data: bins.map((n) => (n ? n : null)),
      }],
    }));
  }

  // ---------------------------------------------------------------- what is odd

  function press(kind) {
    kindWanted = kindWanted === kind ? null : kind;
    for (const chip of document.querySelectorAll("#odd button")) chip.ariaPressed = String(chip.dataset.kind === kindWanted);
    filter();
  }
  const kinds = Object.keys(SEVERITY).map((kind) => [kind, rows.filter((row) => row.flags.some((flag) => flag.kind === kind)).length]);
  $("#odd").hidden = !facts.flags.length;
  $("#odd .chips").replaceChildren(...kinds.filter(([, n]) => n).map(([kind, n]) => {
    const chip = el("button", { type: "button", className: SEVERITY[kind] }, el("b", { textContent: count(n) }), ` ${kind}`);
    chip.dataset.kind = kind;
    chip.ariaPressed = "false";
    chip.addEventListener("click", () => { press(kind); $("#tensors").scrollIntoView({ block: "nearest" }); });
    return chip;
  }));

  // ---------------------------------------------------------------- head, lists

  const { about, scan, strangers } = facts;
  $("#name").textContent = about.name;
  $("#about").textContent = about.file_nbytes === null ? "a folder or an index of shards" : `a file of ${bytes(about.file_nbytes)}`;
  $("#made").textContent = `${about.made}, ${about.by}`;
  const VERDICTS = { safe: "good", unknown: "odd", dangerous: "bad", refused: "bad" };
  const shared = [...sharing.values()].filter((group) => group.length > 1);
  $("#totals").replaceChildren(...[
    [count(rows.length), rows.length === 1 ? "tensor" : "tensors"], [amount(about.numel), "elements"], [bytes(about.nbytes), "of tensors"],
    [count(dtypes.length), dtypes.length === 1 ? "dtype" : "dtypes"], ...(shared.length ? [[count(shared.length), "shared"]] : []),
    [scan.verdict, "pickle", VERDICTS[scan.verdict]],
  ].map(([what, title, tone]) => el("li", {}, el("b", { textContent: what, className: tone || "" }), el("span", { textContent: title }))));

  function lines(selector, items, hidden) {
    const more = items.length > 500 ? [`and ${count(items.length - 500)} more`] : [];
    $(`${selector} .lines`).replaceChildren(...[...items.slice(0, 500), ...more].map((item) => el("li", {}, item)));
    $(selector).hidden = hidden;
  }
  lines("#ties", shared.map((group) => `${bytes(Math.max(...group.map((row) => row.nbytes)))}  ${group.slice(0, 20).map((row) => row.name).join(" = ")}`
    + (group.length > 20 ? ` and ${count(group.length - 20)} more` : "")), !shared.length);
  lines("#strangers", [
    ...strangers.classes.map(([name, n]) => `${count(n)} of ${name}`), ...strangers.named.map(([name, qualified]) => `${name}: ${qualified}`),
  ], !strangers.count);

  const WHAT = {
    safe: "It names nothing but what torch itself writes: plain pickle would run no stranger.",
    unknown: "It names what torch does not: plain pickle would import these modules, and call what it finds there. zipslicer did neither.",
    dangerous: "Plain pickle would run code of this file. zipslicer did not.",
    refused: "zipslicer refuses this file.",
  };
  $("#verdict").replaceChildren(el("b", { className: VERDICTS[scan.verdict], textContent: scan.verdict.toUpperCase() }), ` ${WHAT[scan.verdict]} ${scan.error || ""}`);
  const KINDS = { dangerous: "bad", unknown: "odd", known: "note" };
  $("#findings").replaceChildren(...scan.globals.slice(0, 500).map((finding) => el("li", {},
    el("span", { className: KINDS[finding.kind], textContent: finding.kind }), ` ${finding.name}`)),
  ...(scan.programs.length ? [el("li", { textContent: `${counted(scan.programs.length, "record")} of TorchScript code` })] : []));

  // ---------------------------------------------------------------- the other file

  if (facts.difference) {
    const { other, found, compared } = facts.difference;
    const changes = found.map(([name, kind, before, after, change]) => {
      const [differing, numel, largest, norm, relative] = change || [null, null, null, null, null];
      return { name, kind, before, after, change, differing, numel, largest, norm, relative };
    });
    $("#difference").hidden = false;
    $("#other").textContent = `${other.name}: ${counted(other.tensors, "tensor")}, ${bytes(other.nbytes)}`;
    const TONES = { removed: "bad", added: "good", kind: "odd", shape: "odd", dtype: "odd", values: "" };
    const SAID = { removed: "only here", added: "only there", kind: "another kind", shape: "another shape", dtype: "another dtype", values: "other values" };
    const rest = about.tensors - changes.filter((each) => each.kind !== "added").length;
    let wanted = null;
    const show = () => changed.fill(changes.filter((each) => !wanted || each.kind === wanted));
    const chips = Object.keys(SAID).map((kind) => [kind, changes.filter((each) => each.kind === kind).length]).filter(([, n]) => n).map(([kind, n]) => {
      const chip = el("button", { type: "button", className: TONES[kind] }, el("b", { textContent: count(n) }), ` ${SAID[kind]}`);
      chip.ariaPressed = "false";
      chip.addEventListener("click", () => {
        wanted = wanted === kind ? null : kind;
        for (const each of chips) each.ariaPressed = String(each === chip && wanted !== null);
        show();
      });
      return chip;
    });
    $("#difference .chips").replaceChildren(...chips, el("span", { className: "hint" }, `${count(rest)} the same${compared ? "" : " (values were not compared)"}`));
    const side = (facts_) => (facts_ ? `${facts_[0]} ${dims(facts_[1])}` : "");
    const changed = new Table($("#changed"), [
      { title: "name", name: true, value: (row) => row.name, cell: (row) => named(row.name) },
      { title: "what", width: "112px", value: (row) => row.kind, cell: (row) => el("span", { className: TONES[row.kind], textContent: SAID[row.kind] }) },
      { title: "here", width: "170px", value: (row) => side(row.before) },
      { title: "there", width: "170px", value: (row) => side(row.after) },
      { title: "differ", width: "100px", number: true, hint: "elements", value: (row) => row.differing, cell: (row) => (row.differing === null ? "" : count(row.differing)) },
      { title: "largest", width: "92px", number: true, hint: "absolute difference", value: (row) => row.largest, cell: (row) => number(row.largest) },
      {
        title: "relative", width: "92px", number: true, hint: "norm of the difference over the norm of the first", cell: (row) => (row.change && row.relative === null ? "∞" : number(row.relative)),
        value: (row) => (row.change && row.relative === null ? Infinity : row.relative),
      },
    ], (row) => { if (byName.has(row.name)) choose(byName.get(row.name), true); });
    $("#changed").hidden = !changes.length;
    show();
    const top = changes.filter((each) => each.relative).sort((a, b) => b.relative - a.relative).slice(0, 12);
    if (top.length > 1) {
      $("#changes").hidden = false;
      $("#changes").previousElementSibling.hidden = false;
      $("#changes").style.height = `${20 + 18 * top.length}px`;
      chart($("#changes"), (colour) => ({
        grid: { left: 8, right: 60, top: 4, bottom: 4, containLabel: true },
        tooltip: tooltip(({ data }) => tip(data.name, `relative ${number(data.value)}`), colour),
        xAxis: axis(colour, { type: "value", show: false }),
        yAxis: axis(colour, {
          type: "category", inverse: true, data: top.map((each) => each.name), axisLine: { show: false },
          axisLabel: { color: colour("soft"), fontSize: 11, width: 320, overflow: "truncate" },
        }),
        series: [{
          type: "bar", barMaxWidth: 12, itemStyle: { color: colour("odd"), borderRadius: 3 },
          data: top.map((each) => ({ name: each.name, value: each.relative })),
          label: { show: true, position: "right", color: colour("soft"), fontSize: 11, formatter: ({ value }) => number(value) },
        }],
      }));
    }
  }

  filter();
  let asked = "";
  try { asked = decodeURIComponent(location.hash.slice(1)); } catch { /* no name */ }
  const first = byName.get(asked) || [...rows].sort((a, b) => a.rank - b.rank || b.nbytes - a.nbytes)[0];
  if (first) choose(first, byName.has(asked));
  document.documentElement.dataset.drawn = "yes";
})();
