// Signs in, and adds live values, charts, local times and buttons. It sets no HTML.

const find = (selector, within = document) => within.querySelector(selector);
const findAll = (selector, within = document) => [...within.querySelectorAll(selector)];
const numbers = new Intl.NumberFormat();
const times = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });
const clockTimes = new Intl.DateTimeFormat(undefined, { timeStyle: "medium" });

function localize(within = document) {
  for (const data of findAll("data[data-number]", within)) data.textContent = numbers.format(data.value);
  for (const time of findAll("time[datetime]", within)) {
    const date = new Date(time.dateTime);
    if (isNaN(date)) continue;
    time.textContent = time.hasAttribute("data-clock") ? clockTimes.format(date) : times.format(date);
    time.title = time.dateTime;
  }
}

function element(name, attributes = {}, ...children) {
  const created = document.createElement(name);
  for (const [attribute, value] of Object.entries(attributes)) created.setAttribute(attribute, value);
  created.append(...children);
  return created;
}

// Submits the code in the fragment of the link. Browsers send no fragments.
function signIn() {
  const form = find("form[data-login]");
  const code = location.hash.slice(1);
  if (!form || !code) return;
  history.replaceState(null, "", location.pathname);
  form.elements.code.value = code;
  form.submit();
}

function addCopyButtons() {
  for (const text of findAll("[data-copy]")) {
    const button = element("button", { type: "button", class: "copy" }, "Copy");
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(text.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(text);
        button.textContent = "Selected";
      }
      setTimeout(() => (button.textContent = "Copy"), 2000);
    });
    (text.closest("pre") ?? text).after(button);
  }
}

// Charts draw the tables below them.
const darkScheme = matchMedia("(prefers-color-scheme: dark)");
const palettes = {
  light: ["#2f7d84", "#c2571a", "#5b5fc7", "#8a6d00", "#a8327e", "#3f7d20", "#7a4b2a", "#5f6f76"],
  dark: ["#63c1c9", "#f29a5c", "#a3a6ff", "#e0c04c", "#ef8cc8", "#93d06c", "#d2a27c", "#aab8be"],
};

function readTable(figure) {
  const names = findAll("thead th.number", figure).map((cell) => cell.textContent);
  const rows = findAll("tbody tr", figure);
  const value = (cell) => (find("data", cell) ? Number(find("data", cell).value) : null);
  const columns = names.map((_, column) => rows.map((row) => value(findAll("td", row)[column])));
  return { names, x: rows.map((row) => Number(row.dataset.time)), columns };
}

function drawChart(figure) {
  const plot = find(".plot", figure);
  const { names, x, columns } = readTable(figure);
  const barSeconds = Number(figure.dataset.barSeconds ?? 0);
  if (!self.uPlot) return null;
  if (names.length === 0 || x.length < (barSeconds ? 1 : 2)) {
    plot.replaceChildren(element("p", { class: "muted" }, "There is not enough data yet."));
    return null;
  }
  const isDark = darkScheme.matches;
  const palette = palettes[isDark ? "dark" : "light"];
  const line = isDark ? "#323b3f" : "#d9dee0";
  const drawn = columns.map((column) => [...column]);
  if (barSeconds)
    for (let series = drawn.length - 2; series >= 0; series--)
      for (let row = 0; row < x.length; row++) drawn[series][row] += drawn[series + 1][row];
  // Without a cursor, the legend shows the sum or the latest value.
  const total = (column) => (barSeconds ? column.reduce((sum, value) => sum + value, 0) : column.at(-1));
  const format = (value) => (value == null ? "–" : numbers.format(value));
  const short = new Intl.NumberFormat(undefined, { notation: "compact" });
  const axis = { stroke: isDark ? "#9dabb0" : "#56646a", grid: { stroke: line, width: 1 }, ticks: { stroke: line } };
  const series = names.map((label, index) => ({
    label,
    stroke: palette[index % palette.length],
    fill: barSeconds ? palette[index % palette.length] : undefined,
    width: barSeconds ? 0 : 2,
    points: { show: !barSeconds && x.length < 30 },
    paths: barSeconds ? uPlot.paths.bars({ size: [0.8, 90], align: 1 }) : undefined,
    value: (_, __, number, row) => format(row == null ? total(columns[number - 1]) : columns[number - 1][row]),
  }));
  const options = {
    width: plot.clientWidth,
    height: 230,
    series: [{ label: "Time", value: (_, time) => (time == null ? (barSeconds ? "all" : "latest") : times.format(time * 1000)) }, ...series],
    scales: {
      x: { range: (_, min, max) => [min, Math.max(max + barSeconds, min + 1)] },
      y: { range: (_, __, max) => [0, max > 0 ? max * 1.05 : 1] },
    },
    axes: [{ ...axis, ...(barSeconds >= 86400 && { incrs: [1, 7, 28].map((days) => days * 86400) }) }, { ...axis, size: 64, values: (_, ticks) => ticks.map((tick) => short.format(tick)) }],
    // Days are in UTC.
    ...(barSeconds >= 86400 && { tzDate: (time) => uPlot.tzDate(new Date(time * 1000), "Etc/UTC") }),
    cursor: { drag: { x: false, y: false } },
  };
  plot.replaceChildren();
  return new uPlot(options, [x, ...drawn], plot);
}

function drawCharts() {
  const charts = new Map();
  const draw = (figure) => {
    charts.get(figure)?.destroy();
    charts.set(figure, drawChart(figure));
  };
  const figures = findAll("figure.chart");
  figures.forEach(draw);
  const observer = new ResizeObserver((entries) => {
    for (const { target, contentRect } of entries) {
      const chart = charts.get(target.closest("figure"));
      if (chart && contentRect.width > 0 && Math.abs(chart.width - contentRect.width) > 1)
        chart.setSize({ width: contentRect.width, height: 230 });
    }
  });
  figures.forEach((figure) => observer.observe(find(".plot", figure)));
  darkScheme.addEventListener("change", () => figures.forEach(draw));
}

// Receives events. Hidden pages close their connections: a browser opens only six.
function listen(handlers) {
  let source = null;
  const open = () => {
    if (document.hidden || source) return;
    const only = handlers.request ? "requests" : "state&keys=" + findAll("[data-key]").map((row) => row.dataset.key);
    source = new EventSource("events?only=" + only);
    // The session has ended, or too many pages listen.
    source.onerror = () => source?.readyState === 2 && setTimeout(reloadSoon, 5e3);
    for (const [name, handle] of Object.entries(handlers))
      source.addEventListener(name, (event) => handle(JSON.parse(event.data)));
  };
  const update = () => {
    if (!document.hidden) return open();
    source?.close();
    source = null;
  };
  document.addEventListener("visibilitychange", update);
  addEventListener("pagehide", () => source?.close());
  open();
}

function showNumber(cell, value) {
  const data = cell && find("data", cell);
  if (!data || value == null) return;
  data.value = value;
  data.textContent = numbers.format(value);
}

let reloadTimer = 0;
// Reloads the page when no form has the focus.
function reloadSoon() {
  const isEditing = () => document.activeElement?.closest("main form.fields, main dialog");
  clearTimeout(reloadTimer);
  reloadTimer = setTimeout(() => (isEditing() ? reloadSoon() : location.replace(location.pathname + cleanQuery())), 1e3 + Math.random() * 1e3);
}

function cleanQuery() {
  const query = new URLSearchParams(location.search);
  query.delete("done");
  return query.size > 0 ? `?${query}` : "";
}

function showKey(key) {
  for (const row of findAll("[data-key]").filter((row) => row.dataset.key === key.id)) {
    const state = find("[data-state]", row);
    if (key.removed || (state && state.dataset.state !== key.state)) return reloadSoon();
    showNumber(find('[data-cell="in_flight"]', row), key.in_flight);
    const credits = find('[data-cell="credits"]', row);
    const meter = credits && find("meter", credits);
    if (!meter || key.credits_limit == null) continue;
    const percent = key.credits_limit > 0 ? Math.min(100, Math.floor((key.credits_used / key.credits_limit) * 100)) : 0;
    meter.value = percent;
    showNumber(credits, key.credits_used);
    meter.ariaLabel = meter.ariaLabel.replace(/\d+ %/, `${percent} %`);
    const text = find(".muted:last-child", credits);
    if (text) text.textContent = ` (${percent} %)`;
  }
}

function showOverview(overview) {
  for (const field of findAll("[data-field]")) {
    const value = field.dataset.field.split(".").reduce((part, name) => part?.[name], overview);
    showNumber(field, value);
  }
}

// Adds ended requests to the list.
function startList() {
  const list = find("[data-requests]");
  if (!list) return {};
  const form = find("form[data-live]");
  const [pause, status] = [find("[data-pause]"), find("[data-status]")];
  findAll("[data-script]").forEach((part) => (part.hidden = false));
  const maximum = 500;
  let waiting = [];
  let isPaused = false;
  const isShown = (row) => {
    const text = form.elements.q.value.toLowerCase();
    const isFailed = row.classList.contains("bad") || row.dataset.retried === "true";
    return row.textContent.toLowerCase().includes(text) && (!form.elements.failed.checked || isFailed);
  };
  const filter = () => [...list.rows].forEach((row) => (row.hidden = !isShown(row)));
  const report = () => (status.textContent = isPaused ? `${numbers.format(waiting.length)} waiting` : "");
  const show = () => {
    report();
    if (isPaused || waiting.length === 0) return;
    find("[data-empty]", list)?.remove();
    waiting.splice(0).forEach((row) => {
      row.hidden = !isShown(row);
      list.prepend(row);
    });
    while (list.rows.length > maximum) list.lastElementChild.remove();
  };
  pause.addEventListener("click", () => {
    isPaused = !isPaused;
    pause.textContent = isPaused ? "Continue" : "Pause";
    pause.setAttribute("aria-pressed", isPaused);
    show();
  });
  form.elements.q.addEventListener("input", filter);
  form.elements.failed.addEventListener("change", filter);
  form.addEventListener("submit", (event) => event.submitter === pause && event.preventDefault());
  const duration = (ms) => (ms < 1000 ? `${ms} ms` : `${numbers.format(Math.round(ms / 100) / 10)} s`);
  const row = (request) => {
    const isServed = request.outcome === "served";
    const time = element("time", { datetime: new Date().toISOString(), "data-clock": "" });
    const attempts = element("td", {}, String(request.attempts));
    const reasons = request.retry_reasons ?? [];
    if (reasons.length > 0) attempts.append(element("span", { class: "muted" }, ` after ${reasons.join(", ").replaceAll("_", " ")}`));
    const result = `${request.status ?? ""} ${request.outcome.replaceAll("_", " ")}`.trim();
    const created = element(
      "tr",
      { class: `new ${isServed ? "ok" : "bad"}`, "data-request": request.request_id, "data-retried": reasons.length > 0 },
      element("td", {}, time),
      element("td", {}, element("code", {}, `${request.method} ${request.route ?? "–"}`)),
      element("td", {}, request.client ?? "–"),
      element("td", {}, request.short_key ?? "–"),
      element("td", {}, result),
      attempts,
      element("td", { class: "number" }, duration(request.total_ms)),
      element("td", { class: "number" }, numbers.format(request.credits)),
    );
    localize(created);
    return created;
  };
  return {
    request: (request) => {
      if (list.querySelector(`[data-request="${CSS.escape(request.request_id)}"]`)) return;
      waiting.push(row(request));
      waiting = waiting.slice(-maximum);
      show();
    },
  };
}

signIn();
localize();
addCopyButtons();
drawCharts();
const page = document.body.dataset.page;
if (page === "live") listen(startList());
if (["", "keys", "key"].includes(page)) listen({ key: showKey, overview: showOverview });
if (page === "") setInterval(() => document.hidden || location.replace(location.pathname), 6e4);
