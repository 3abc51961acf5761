"use strict";
// The page's own controls: theme, arms shown, bandwidth of a link, choice of a run, sorted tables, print.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const charts = {}; // figure models by key
  const views = {}; // their views, for print
  const $$ = (selector, within = document) => [...within.querySelectorAll(selector)];
  const root = document.documentElement;

  // ---- theme ----
  function paint() {
    const css = getComputedStyle(root);
    const of = (name) => css.getPropertyValue(name).trim();
    const [ink, soft, grid] = [of("--ink"), of("--soft"), of("--grid")];
    for (const chart of Object.values(charts)) {
      for (const model of chart.document.all_models) {
        if (/Axis$/.test(model.type))
          model.setv({ axis_label_text_color: soft, major_label_text_color: ink, axis_line_color: soft, major_tick_line_color: soft });
        else if (model.type === "Grid") model.setv({ grid_line_color: grid });
      }
    }
  }
  const isDark = () => getComputedStyle(root).getPropertyValue("--page").trim() !== "#fff";
  document.getElementById("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    paint();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);

  // ---- arms and bandwidth: what a source holds, less the arms that are hidden, at the seconds of the link ----
  const all = new Map(); // every row of a source, as it came
  const hidden = new Set();
  let bits = 1e8; // a second
  const seconds = (fixed, sent) => (Array.isArray(fixed) ? fixed.map((s, i) => s + sent[i] / bits) : fixed + sent / bits);
  function refresh(chart) {
    for (const source of new Set(chart.renderers.map((renderer) => renderer.data_source))) {
      if (!source.data.number) continue;
      if (!all.has(source)) all.set(source, source.data);
      const columns = { ...all.get(source) };
      if (columns.fixed) columns[columns.xs ? "xs" : "x"] = columns.fixed.map((fixed, i) => seconds(fixed, columns.bits[i]));
      const kept = columns.number.map((_, i) => i).filter((i) => !hidden.has(columns.number[i]));
      source.data = Object.fromEntries(Object.entries(columns).map(([name, values]) => [name, kept.map((i) => values[i])]));
    }
    const [line, arms] = ["front", "arms"].map((name) => chart.renderers.find((renderer) => renderer.name === name));
    if (line) line.data_source.data = front(arms.data_source.data);
  }
  function front({ x, y }) {
    const order = x.map((_, i) => i).sort((a, b) => x[a] - x[b] || y[b] - y[a]);
    const line = { x: [], y: [] };
    let best = -Infinity;
    for (const i of order)
      if (y[i] > best) { line.x.push(x[i]); line.y.push(y[i]); best = y[i]; }
    return line;
  }
  for (const button of $$("[data-arm]"))
    button.addEventListener("click", () => {
      const number = Number(button.dataset.arm);
      const isShown = hidden.delete(number) || !hidden.add(number);
      for (const twin of $$(`[data-arm="${number}"]`)) twin.setAttribute("aria-pressed", isShown);
      Object.values(charts).forEach(refresh);
    });

  const slider = document.getElementById("bandwidth");
  function inWords(bits) {
    for (const [unit, size] of [["Gbit/s", 1e9], ["Mbit/s", 1e6], ["kbit/s", 1e3]])
      if (bits >= size * 0.9995) return `${Number((bits / size).toPrecision(3))} ${unit}`;
  }
  function onLink(chosen) {
    bits = chosen;
    document.getElementById("bandwidth-text").textContent = inWords(bits);
    for (const key of LINK_CHARTS) if (charts[key]) refresh(charts[key]);
  }
  if (slider) {
    slider.addEventListener("input", () => onLink(10 ** Number(slider.value)));
    for (const button of $$("[data-bandwidth]"))
      button.addEventListener("click", () => {
        slider.value = Math.log10(Number(button.dataset.bandwidth));
        onLink(Number(button.dataset.bandwidth));
      });
  }

  // ---- choice of a run ----
  function switchTo(chart, variant) {
    const source = chart.renderers[0].data_source;
    const box = document.getElementById(chart.name).closest("figure");
    const first = Object.values(variant.columns)[0];
    box.hidden = !first.length;
    if (variant.caption) box.querySelector("figcaption").textContent = variant.caption;
    if (variant.height) {
      chart.height = variant.height;
      document.getElementById(chart.name).style.minHeight = `${variant.height}px`;
    }
    if (variant.y_factors) chart.y_range.factors = variant.y_factors;
    if (variant.x_factors) chart.x_range.factors = variant.x_factors;
    if (variant.limits) chart.x_range.setv({ start: variant.limits[0], end: variant.limits[1], reset_start: variant.limits[0], reset_end: variant.limits[1] });
    if (variant.high) for (const model of chart.document.all_models) if (model.name === "shade") model.high = variant.high;
    source.data = variant.columns;
  }
  for (const box of $$("[data-choice]")) {
    const choice = data.choices[box.dataset.choice];
    box.querySelector("select")?.addEventListener("change", (event) =>
      choice.keys.forEach((key, i) => switchTo(charts[key], choice.variants[Number(event.target.value)][i])));
  }
  for (const box of $$("[data-diagrams]"))
    box.querySelector("select")?.addEventListener("change", (event) =>
      $$(".drawn", box).forEach((drawn, i) => (drawn.hidden = i !== Number(event.target.value))));

  // ---- tables ----
  for (const button of $$("thead button"))
    button.addEventListener("click", () => {
      const column = [...button.closest("tr").children].indexOf(button.parentElement);
      const body = button.closest("table").tBodies[0];
      const order = button.dataset.order === "down" ? "up" : "down";
      for (const other of $$("button", button.closest("tr"))) delete other.dataset.order;
      button.dataset.order = order;
      const value = (row) => row.children[column].dataset.sort;
      const text = (row) => row.children[column].textContent;
      const compare = (a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x !== undefined && y !== undefined) return x - y;
        if (x !== undefined || y !== undefined) return x === undefined ? -1 : 1;
        return text(a).localeCompare(text(b), "en", { numeric: true });
      };
      body.append(...[...body.rows].sort((a, b) => (order === "up" ? compare(a, b) : compare(b, a))));
    });

  // ---- contents: where the reader is ----
  const links = new Map($$("nav a").map((link) => [link.hash.slice(1), link]));
  const watcher = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting) continue;
        for (const link of links.values()) link.classList.toggle("here", link === links.get(entry.target.id));
      }
    },
    { rootMargin: "-10% 0px -80% 0px" },
  );
  for (const section of $$("main section")) watcher.observe(section);

  // ---- print: pictures in place of canvases, which do not shrink with the paper; always light ----
  let before;
  addEventListener("beforeprint", () => {
    before = root.dataset.theme;
    root.dataset.theme = "light";
    paint();
    for (const details of $$("details")) details.open = true;
    for (const [key, view] of Object.entries(views)) {
      const picture = document.getElementById(key).querySelector("img") ?? document.createElement("img");
      picture.alt = "";
      picture.src = view.export("auto", true).canvas.toDataURL();
      document.getElementById(key).append(picture);
    }
  });
  addEventListener("afterprint", () => {
    if (before === undefined) delete root.dataset.theme;
    else root.dataset.theme = before;
    paint();
  });

  // ---- charts ----
  async function drawAll() {
    for (const item of data.items) {
      const manager = await Bokeh.embed.embed_item(item);
      for (const view of manager.roots.filter((view) => view.model.type === "Figure")) {
        charts[view.model.name] = view.model;
        views[view.model.name] = view;
      }
    }
    for (const choice of Object.values(data.choices))
      choice.keys.forEach((key, i) => switchTo(charts[key], choice.variants[0][i]));
    if (slider) onLink(10 ** Number(slider.value));
    paint();
    root.dataset.drawn = Object.keys(charts).length;
  }
  Bokeh.set_log_level("warn");
  drawAll();
  window.fedqReport = { charts, views };
})();
