"use strict";
(() => {
  const root = document.documentElement;
  const CONFIG = { responsive: false, displayModeBar: false };
  const drawn = new Set();

  function colours() {
    const style = getComputedStyle(root);
    const of = (name) => style.getPropertyValue(name).trim();
    return { ink: of("--ink"), soft: of("--soft"), line: of("--line"), paper: of("--paper") };
  }

  // The layout of a chart in the colours of the page, without what the page shows itself.
  function themed(layout) {
    const { ink, line, paper } = colours();
    // A copy down to the ground: plotly writes into what it gets.
    const own = { ...structuredClone(layout), font: { color: ink, size: 12 }, autosize: true };
    delete own.title;
    delete own.sliders;
    own.margin = { ...own.margin, t: layout.annotations && layout.annotations.length ? 24 : 10 };
    for (const axis of ["xaxis", "yaxis"]) {
      own[axis] = { ...own[axis], gridcolor: line, zerolinecolor: line, linecolor: line };
    }
    own.hoverlabel = { bgcolor: paper, bordercolor: line, font: { color: ink } };
    return own;
  }

  function contentOf(figure) {
    if (!figure.content) figure.content = JSON.parse(figure.querySelector('script[type="application/json"]').textContent);
    return figure.content;
  }

  function draw(figure, size = {}) {
    if (drawn.has(figure)) return;
    drawn.add(figure);
    const { data, layout } = contentOf(figure);
    const plot = figure.querySelector(".plot");
    Plotly.newPlot(plot, data, { ...themed(layout), ...size }, CONFIG);
    plot.style.minHeight = "";
    const slider = sliderOf(figure);
    if (slider) show(figure, stepOf(slider));
  }

  const sliderOf = (figure) => figure.closest("section").querySelector(":scope > .slider input");
  const stepOf = (slider) => slider.dataset.steps.split(" ")[Number(slider.value)];

  // Shows a chart's numbers at a step: its own latest step if it has none there.
  function show(figure, step) {
    const { frames, data } = contentOf(figure);
    if (!frames || !frames.length) return;
    const reached = frames.filter((one) => Number(one.name) <= Number(step));
    const frame = reached.length ? reached[reached.length - 1] : frames[0];
    frame.data.forEach((trace, place) => {
      const changed = {};
      for (const key of ["z", "text", "y"]) {
        if (key in trace) {
          changed[key] = [trace[key]];
          data[place][key] = trace[key];
        }
      }
      Plotly.restyle(figure.querySelector(".plot"), changed, [place]);
    });
    const numbers = figure.querySelector(".numbers");
    if (numbers.open) fill(figure, numbers);
  }

  for (const slider of document.querySelectorAll(".slider input")) {
    const output = slider.parentElement.querySelector("output");
    slider.addEventListener("input", () => {
      const step = stepOf(slider);
      output.textContent = step;
      slider.setAttribute("aria-valuetext", `step ${step}`);
      for (const figure of slider.closest("section").querySelectorAll("figure.chart")) {
        if (drawn.has(figure)) show(figure, step);
      }
    });
  }

  // Names are escaped for plotly, which reads tags in them.
  const unescaped = (text) => text.replaceAll("&lt;", "<").replaceAll("&gt;", ">").replaceAll("&amp;", "&");

  // A table of a chart's numbers, for those who do not see it or want to copy them.
  function fill(figure, details) {
    details.querySelectorAll("div").forEach((old) => old.remove());
    const { data } = contentOf(figure);
    const table = document.createElement("table");
    const row = (cells, tag) => {
      const line = table.insertRow();
      for (const cell of cells) {
        const empty = cell === null || cell === undefined || cell === "";
        const one = document.createElement(empty ? "td" : tag);
        one.textContent = empty ? "" : unescaped(String(cell));
        line.append(one);
      }
    };
    if (data[0] && data[0].type === "heatmap") {
      row(["", ...data[0].x], "th");
      data[0].z.forEach((values, place) => row([data[0].y[place], ...values], "td"));
    } else {
      row(["series", "x", "y"], "th");
      for (const trace of data) {
        if (trace.fill || trace.hoverinfo === "skip") continue;
        (trace.x || []).forEach((x, place) => row([trace.name || (trace.text || [])[place], x, (trace.y || [])[place]], "td"));
      }
    }
    const box = document.createElement("div");
    box.tabIndex = 0;
    box.setAttribute("role", "group");
    box.setAttribute("aria-label", details.querySelector("summary").textContent);
    box.append(table);
    details.append(box);
  }

  for (const figure of document.querySelectorAll("figure.chart")) {
    const details = figure.querySelector(".numbers");
    details.addEventListener("toggle", () => details.open && fill(figure, details));
  }

  // Charts are drawn when they come near the screen, so that a long page opens at once.
  const near = new IntersectionObserver(
    (seen) => seen.filter((one) => one.isIntersecting).forEach((one) => { near.unobserve(one.target); draw(one.target); }),
    { rootMargin: "400px" },
  );
  document.querySelectorAll("figure.chart").forEach((figure) => near.observe(figure));

  function recolour() {
    for (const figure of drawn) {
      const { data, layout } = contentOf(figure);
      Plotly.react(figure.querySelector(".plot"), data, themed(layout), CONFIG);
    }
  }
  document.getElementById("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    recolour();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);

  // A link to something folded opens it.
  function open(hash) {
    const target = hash.length > 1 && document.getElementById(decodeURIComponent(hash.slice(1)));
    for (let one = target; one; one = one.parentElement) if (one.tagName === "DETAILS") one.open = true;
    if (target) target.scrollIntoView();
  }
  addEventListener("hashchange", () => open(location.hash));
  open(location.hash);

  // On paper: everything drawn, in dark ink, as wide as one of two columns. Paper is laid out before any script may measure it.
  const PAPER_WIDTH = 330;
  let before;
  // Draws every chart anew when it is next looked at: one that plotly resizes keeps the room that its legend took before.
  function forget() {
    for (const figure of drawn) {
      const plot = figure.querySelector(".plot");
      plot.style.minHeight = `${plot.offsetHeight}px`;
      Plotly.purge(plot);
      near.observe(figure);
    }
    drawn.clear();
  }
  let width = innerWidth;
  let waiting;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(forget, 150);
  });
  addEventListener("beforeprint", () => {
    before = root.dataset.theme;
    root.dataset.theme = "light";
    forget();
    for (const figure of document.querySelectorAll("figure.chart")) {
      if (figure.closest("details:not([open])") === null) draw(figure, { width: PAPER_WIDTH, autosize: false });
    }
  });
  addEventListener("afterprint", () => {
    if (before) root.dataset.theme = before;
    else delete root.dataset.theme;
    forget();
  });
})();
