"use strict";
(() => {
  const cells = JSON.parse(document.getElementById("data").textContent);
  const panel = document.getElementById("weight");
  if (!panel) return;

  // Elements are made here, never parsed from text: a name from a model stays a text.
  const make = (tag, attributes = {}, ...children) => {
    const svg = ["svg", "path", "line", "text"].includes(tag);
    const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  };
  const percent = (value) => (value === 0 ? "0 %" : `${Number((100 * value).toPrecision(3))} %`);

  const histogram = (d) => {
    const width = 420, height = 150, base = height - 18, count = d.original.length;
    const top = Math.max(1, ...d.original, ...d.compressed);
    const x = (bin) => (bin * width) / count, y = (value) => base - (value * (base - 6)) / top;
    const steps = (values) => values.map((v, i) => `${i ? "L" : "M"}${x(i).toFixed(1)} ${y(v).toFixed(1)}L${x(i + 1).toFixed(1)} ${y(v).toFixed(1)}`).join("");
    const picture = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "distribution of the values before and after" });
    picture.append(
      make("path", { d: `M0 ${base}L${steps(d.original).slice(1)}L${width} ${base}Z`, style: "fill:var(--p3);opacity:.55" }),
      make("path", { d: steps(d.compressed), style: "fill:none;stroke:var(--accent);stroke-width:1.5" }),
      make("line", { x1: 0, x2: width, y1: base, y2: base, style: "stroke:var(--line)" }),
    );
    for (let k = -d.reach; k <= d.reach; k += 2) {
      const at = ((k + d.reach) * width) / (2 * d.reach);
      picture.append(make("text", { x: at, y: height - 4, "text-anchor": k === -d.reach ? "start" : k === d.reach ? "end" : "middle" }, k === 0 ? "0" : `${k > 0 ? "+" : "\u2212"}${Math.abs(k)} σ`));
    }
    return picture;
  };

  const errors = (w) => {
    const most = Math.max(w.error, w.error_rounded) || 1;
    const row = (label, kind, value) => [make("span", {}, label), make("i", { class: kind, style: `width:${(100 * value) / most}%` }), make("span", { class: "number" }, percent(value))];
    return make("div", { class: "error" }, ...row("rounded to nearest", "before", w.error_rounded), ...row("as compressed", "after", w.error));
  };

  const channels = (c) => {
    const times = (value) => `${value} ×`;
    const head = ["channel", ...(c.inputs ? ["inputs"] : []), "weights", "of the error"].map((text, i) => make("th", { class: i ? "number" : "" }, text));
    const body = c.index.map((channel, i) =>
      make("tr", {}, make("td", {}, String(channel)), ...(c.inputs ? [make("td", { class: "number" }, times(c.inputs[i]))] : []), make("td", { class: "number" }, times(c.weights[i])), make("td", { class: "number" }, percent(c.error[i]))));
    return make("table", {}, make("tr", {}, ...head), ...body);
  };

  const used = (u) => {
    const row = (label, pair) => make("tr", {}, make("td", {}, label), ...pair.map((value) => make("td", { class: "number" }, percent(value))));
    const head = ["", "before transforms", "after"].map((text, i) => make("th", { class: i ? "number" : "" }, text));
    return make("table", {}, make("tr", {}, ...head), row("rows of the weight", u.weights), ...(u.inputs ? [row("inputs", u.inputs)] : []));
  };

  const legend = () => make("p", { class: "legend" }, make("i", { class: "before" }), make("span", {}, "original"), make("i", { class: "after" }), make("span", {}, "compressed"));

  const show = (number) => {
    const [w, ...others] = cells[number];
    const parts = [
      make("h3", {}, w.name),
      make("p", { class: "note" }, `${w.shape.join(" × ")}, ${w.format}, ${w.bits_per_weight.toFixed(2)} bits a weight`),
      make("h4", {}, `Relative squared error of the ${w.measured_on}`), errors(w),
    ];
    if (w.picture) {
      const d = w.picture.distribution, c = w.picture.channels;
      const outside = d.outside > 0 ? ` ${percent(d.outside)} of the values lie beyond ${d.reach} σ;` : "";
      parts.push(
        make("h4", {}, "Distribution of the values"), histogram(d), legend(),
        make("p", { class: "note" }, `σ = ${d.deviation};${outside} the largest is ${d.largest} σ.`),
        make("h4", {}, `Outlier channels: the largest ${c.ranked_by} of ${c.of}, as multiples of the median channel's`), channels(c),
      );
      if (w.picture.utilization) parts.push(make("h4", {}, "Use of the range that one scale spans"), used(w.picture.utilization));
    }
    for (const text of [...w.fallbacks, ...w.notes]) parts.push(make("p", { class: "note" }, text));
    if (others.length) {
      const row = (o) => make("tr", {}, make("td", {}, o.name), make("td", { class: "number" }, percent(o.error)));
      parts.push(make("details", {}, make("summary", {}, `${others.length} more in this cell`), make("table", {}, ...others.map(row))));
    }
    panel.replaceChildren(...parts);
    for (const button of document.querySelectorAll("button[data-cell]")) button.setAttribute("aria-pressed", String(button.dataset.cell === String(number)));
  };

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-cell]");
    if (!button) return;
    show(Number(button.dataset.cell));
    panel.scrollIntoView({ block: "nearest", behavior: "smooth" });
  });
  let worst = 0;
  cells.forEach((cell, i) => { if (cell[0].error > cells[worst][0].error) worst = i; });
  if (cells.length) show(worst);
})();
