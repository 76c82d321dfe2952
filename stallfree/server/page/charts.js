// The charts: rows of iterations into uPlot's columns, and their latest values into words. Where rows come from is not known here.

/* global uPlot */

export const WINDOW_S = 30;
const IDLE_S = 0.2; // a pause between two iterations from which the chart shows a gap

// The places of a row's values, as the server sends them.
const [, T_START, T_END, DECODES, PREFILL, LIMIT, BUDGET, MARGIN, RUNNING, WAITING, FREE] = Array(11).keys();

const whole = (value) => value.toLocaleString("en");
export const duration = (seconds) =>
  seconds < 0.01 ? `${(seconds * 1e3).toFixed(1)} ms` : seconds < 1 ? `${Math.round(seconds * 1e3)} ms` : `${seconds.toFixed(2)} s`;
const milliseconds = (value) => duration(value / 1e3);

// `per: "iteration"` draws each value over its iteration's time, with gaps where nothing ran; "moment" from its iteration's end on.
// `values(row, about)` gives a value for each of the series, in order; what is drawn first lies below. `ends(about)` are those at
// both ends of the axis and in gaps, `now(about)` those at its right end. `area` is the opacity of what a series fills, in hex.
const CHARTS = {
  tokens: {
    title: "Tokens per iteration",
    per: "iteration",
    series: [
      { label: "prefill", color: "--prefill", area: "ff", read: (u, i) => whole(u.data[1][i] - u.data[2][i]) },
      { label: "decode", color: "--decode", area: "ff", format: whole },
    ],
    values: (row) => [row[DECODES] + row[PREFILL], row[DECODES]],
  },
  time: {
    title: "Iteration time",
    per: "iteration",
    axis: "ms",
    series: [
      { label: "time", color: "--decode", area: "33", outline: true, format: milliseconds },
      { label: "limit", color: "--limit", format: milliseconds },
      { label: "SLO", color: "--slo", dashed: true, format: milliseconds },
    ],
    values: (row, about) => [(row[T_END] - row[T_START]) * 1e3, row[LIMIT] && row[LIMIT] * 1e3, pace(about)],
    ends: (about) => [null, null, pace(about)],
  },
  budget: {
    title: "Budget and margin",
    per: "iteration",
    series: [
      { label: "budget", color: "--decode", format: (value) => `${whole(value)} tokens` },
      { label: "margin", color: "--limit", scale: "margin", format: (value) => `× ${value.toFixed(2)}` },
    ],
    values: (row) => [row[BUDGET], row[MARGIN]],
  },
  requests: {
    title: "Requests",
    per: "moment",
    series: [
      { label: "waiting", color: "--waiting", format: whole },
      { label: "running", color: "--decode", format: whole },
    ],
    values: (row) => [row[WAITING], row[RUNNING]],
    now: (about) => [about.waiting, about.running],
  },
  memory: {
    title: "KV cache in use",
    per: "moment",
    axis: "%",
    most: 100,
    series: [{ label: "blocks", color: "--memory", area: "cc", format: (value) => `${value.toFixed(1)} %` }],
    values: (row, about) => [used(row[FREE], about)],
    now: (about) => [used(about.free_blocks, about)],
  },
};

const used = (free, about) => 100 * (1 - free / about.num_blocks);
const pace = (about) => {
  const target = about.targets.tbt ?? about.targets.tpot;
  return target && target.seconds * 1e3;
};

class Chart {
  constructor(figure, spec) {
    this.spec = spec;
    this.keys = spec.series.map((series) => key(series));
    const caption = document.createElement("figcaption");
    const title = document.createElement("b");
    title.textContent = spec.title;
    caption.append(title, ...this.keys.map(({ element }) => element).reverse());
    this.plot = document.createElement("div");
    this.plot.className = "plot";
    this.plot.setAttribute("role", "img");
    figure.replaceChildren(caption, this.plot);
    this.data = [[], ...spec.series.map(() => [])];
    this.draw();
    new ResizeObserver(() => this.uplot.setSize(this.size())).observe(this.plot);
  }

  size() {
    return { width: this.plot.clientWidth, height: this.plot.clientHeight };
  }

  // Anew, with the colours that hold now.
  draw() {
    this.uplot?.destroy();
    const style = getComputedStyle(document.documentElement);
    const color = (name) => style.getPropertyValue(name).trim();
    const { spec } = this;
    const axis = { stroke: color("--faint"), font: "12px system-ui, sans-serif", ticks: { show: false } };
    const grid = { stroke: color("--grid"), width: 1 };
    const compact = (_, values) => values.map((value) => (value >= 1e4 ? `${value / 1e3}k` : String(value)));
    this.uplot = new uPlot(
      {
        ...this.size(),
        padding: [8, 14, 0, 0],
        legend: { show: false },
        cursor: { y: false, drag: { x: false, y: false }, points: { show: false }, sync: { key: "iterations" } },
        scales: {
          x: { time: false, range: [-WINDOW_S, 0] },
          y: { range: (_, low, high) => [0, spec.most ?? Math.max(1, high * 1.08)] },
          margin: { range: (_, low, high) => (low === null ? [null, null] : [Math.min(1, low), Math.max(1, high) + 0.1]) },
        },
        axes: [
          { ...axis, grid: { show: false }, space: 60, size: 24, gap: 7, values: (_, values) => values.map((v) => (v ? `${v} s` : "now")) },
          { ...axis, grid, size: 46, space: 32, values: compact, incrs: [1, 2, 5, 10, 20, 25, 50].flatMap((n) => [n, n * 100, n * 1e4]).sort((a, b) => a - b) },
          { ...axis, scale: "margin", side: 1, grid: { show: false }, size: 40, space: 40, values: (_, values) => values.map((v) => v.toFixed(1)) },
        ].slice(0, spec.series.some(({ scale }) => scale) ? 3 : 2),
        series: [
          {},
          ...spec.series.map((series) => ({
            stroke: color(series.color),
            fill: series.area && color(series.color) + series.area,
            width: series.area && !series.outline ? 0 : 1.5,
            dash: series.dashed && [6, 4],
            scale: series.scale ?? "y",
            paths: uPlot.paths.stepped({ align: spec.per === "iteration" ? -1 : 1 }),
            points: { show: false },
          })),
        ],
        hooks: { setCursor: [() => this.say()] },
      },
      this.data,
      this.plot,
    );
    this.say();
  }

  show(rows, about) {
    this.data = columns(rows, about, this.spec);
    this.uplot.setData(this.data);
    this.say();
  }

  // The values under the cursor, or the latest.
  say() {
    const { uplot, spec } = this;
    const words = spec.series.map((series, i) => {
      const column = uplot.data[i + 1];
      const at = uplot.cursor.idx ?? column.findLastIndex((value) => value != null);
      const text = column[at] == null ? "–" : (series.read?.(uplot, at) ?? series.format(column[at]));
      this.keys[i].output.textContent = text;
      return `${series.label} ${text}`;
    });
    this.plot.setAttribute("aria-label", `${spec.title}, last ${WINDOW_S} seconds: ${words.reverse().join(", ")}`);
  }
}

function key({ label, color, area, dashed }) {
  const element = document.createElement("span");
  const mark = document.createElement("i");
  const output = document.createElement("output");
  element.className = "key";
  mark.className = dashed ? "dashed" : area ? "" : "line";
  mark.style.color = `var(${color})`;
  output.setAttribute("aria-live", "off"); // four times a second is no news to be read out
  element.append(mark, label, output);
  return { element, output };
}

function columns(rows, about, { series, values, per, ends, now }) {
  const data = [[], ...series.map(() => [])];
  const push = (t, column) => [t, ...column].forEach((value, i) => data[i].push(value));
  const nothing = ends?.(about) ?? series.map(() => null);
  let before = Math.min(about.now - WINDOW_S, rows[0]?.[T_START] ?? about.now) - 2 * IDLE_S;
  for (const row of rows) {
    const column = values(row, about);
    if (per === "iteration" && row[T_START] - before > IDLE_S) {
      push(before - about.now + 1e-6, nothing);
      push(row[T_START] - about.now, column);
    }
    push(row[T_END] - about.now, column);
    before = row[T_END];
  }
  if (per === "iteration") push(before - about.now + 1e-6, nothing);
  if (ends) push(0, ends(about));
  if (now) push(0, now(about));
  return data;
}

export function charts() {
  const all = [...document.querySelectorAll("[data-chart]")].map((figure) => new Chart(figure, CHARTS[figure.dataset.chart]));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => all.forEach((chart) => chart.draw()));
  return (rows, about) => all.forEach((chart) => chart.show(rows, about));
}
