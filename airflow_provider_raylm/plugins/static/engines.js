// The Engines page: polls what is there, and changes in the document only what has changed.
// Whatever comes from a cluster is text: it enters the document by textContent and nothing else.
"use strict";

const POLL_MS = 3000;
const HIDDEN_MS = 30000;
const SVG = "http://www.w3.org/2000/svg";
const byId = (id) => document.getElementById(id);

const panels = new Map(); // by connection and job: the records of a panel that is open
const asked = new Map(); // by connection and application: when this page asked for its end
let answer = null;
let skew = 0; // the server's clock minus this one's, in seconds
let timer = null;
let polls = 0;

// ---- the document -------------------------------------------------------------------------------------------------

function el(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined && text !== null) made.textContent = text;
  return made;
}

function set(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// Keep the children of *parent* that have the keys of *items*, in their order; make and update the others.
function reconcile(parent, items, keyOf, make, update) {
  const there = new Map(Array.from(parent.children, (child) => [child.dataset.key, child]));
  const wanted = new Set(items.map((item) => String(keyOf(item))));
  // First: else all behind one that goes would be moved, and what is moved loses the keyboard's focus.
  for (const [key, child] of there) if (!wanted.has(key)) child.remove();
  let at = parent.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    let child = there.get(key);
    if (!child) {
      child = make(item);
      child.dataset.key = key;
    }
    if (child === at) at = at.nextElementSibling;
    else parent.insertBefore(child, at);
    update(child, item);
  }
}

// What a button does, and to what: a list of all buttons has no cards around them.
function caption(button, text, what) {
  set(button, text);
  button.setAttribute("aria-label", `${text} ${what}`);
}

// The page lies in a frame of Airflow's that may neither open windows nor leave: the document around it does.
function link(className) {
  const made = el("a", className);
  made.addEventListener("click", (event) => {
    // What leads nowhere would be the frame's own address for the document around it.
    if (!made.hasAttribute("href") || window.parent === window || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    const outer = window.parent.document.createElement("a");
    outer.href = made.href;
    if (made.target) {
      outer.target = made.target;
      outer.rel = "noopener noreferrer";
    }
    outer.click();
  });
  return made;
}

function lead(made, text, href, elsewhere) {
  set(made, text);
  if (href) {
    if (made.getAttribute("href") !== href) made.setAttribute("href", href);
  } else {
    made.removeAttribute("href");
  }
  if (elsewhere) {
    made.target = "_blank";
    made.rel = "noopener noreferrer";
  }
}

const code = encodeURIComponent;
const dagUrl = (dag) => `../dags/${code(dag)}`;
const runUrl = (dag, run) => `../dags/${code(dag)}/runs/${code(run)}`;

function taskUrl(task) {
  if (!task.dag_id || !task.run_id || !task.task_id) return "";
  const base = `${runUrl(task.dag_id, task.run_id)}/tasks/${code(task.task_id)}`;
  return task.map_index === null ? base : `${base}/mapped/${task.map_index}`;
}

function dashboardUrl(connection, path) {
  return /^https?:\/\//.test(connection.dashboard_url) ? `${connection.dashboard_url}/#/${path}` : "";
}

// ---- words --------------------------------------------------------------------------------------------------------

function count(number, digits = 0) {
  return number === null ? "–" : number.toLocaleString(undefined, { maximumFractionDigits: digits });
}

function many(number, one, more) {
  return `${count(number)} ${number === 1 ? one : more}`;
}

function span(seconds) {
  if (seconds === null) return "–";
  const whole = Math.max(Math.round(seconds), 0);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
  return `${Math.floor(whole / 86400)} d ${Math.floor((whole % 86400) / 3600)} h`;
}

function rate(number, unit) {
  return number === null ? "" : `${count(number, number < 10 ? 1 : 0)} ${unit}`;
}

const OWNERS = {
  over: (engine) => `its run is over${engine.run_state ? ` (${engine.run_state})` : ""}`,
  gone: () => "its run is deleted",
  command: () => "of a command, which tears it down",
  elsewhere: () => "another Airflow's",
  hidden: () => "a DAG that you may not read",
};

const STATES = {
  looking: "Looking at the cluster…",
  silent: "The cluster does not answer.",
  refused: "The cluster does not accept the connection's token.",
  broken: "The connection cannot work.",
};

// ---- engines ------------------------------------------------------------------------------------------------------

function fact(list, name) {
  const row = el("div");
  const value = el("dd");
  row.append(el("dt", "", name), value);
  list.append(row);
  return value;
}

function makeEngine() {
  const root = el("article", "engine");
  const head = el("div", "engine-head");
  const who = el("div", "who");
  const title = el("div");
  const parts = {
    name: link("name"),
    status: el("span", "badge"),
    alarm: el("span", "badge warn"),
    dag: link(),
    run: link(),
    arrow: el("span", "quiet", " › "),
    model: el("div", "model"),
    stop: el("button", "danger", "Stop"),
    message: el("p", "message"),
    tasks: el("div", "tasks"),
  };
  const owner = el("div", "owner");
  const actions = el("div", "actions");
  parts.owner = owner;
  parts.stop.type = "button";
  parts.stop.addEventListener("click", () => confirmStop(root.item.connection, root.item.engine));
  title.append(parts.name, parts.status, parts.alarm);
  owner.append(parts.dag, parts.arrow, parts.run);
  who.append(title, owner, parts.model);
  actions.append(parts.stop);
  head.append(who, actions);
  const facts = el("dl", "facts");
  parts.replicas = fact(facts, "Replicas");
  parts.age = fact(facts, "Age");
  parts.lease = fact(facts, "Lease left");
  parts.gpu = fact(facts, "GPU time");
  parts.cost = fact(facts, "Cost");
  root.append(head, facts, parts.message, parts.tasks);
  root.parts = parts;
  return root;
}

function isStopping(connection, engine) {
  const at = asked.get(`${connection.conn_id} ${engine.application}`);
  // What is being stopped is told by the cluster soon after it was asked.
  return engine.stopping || (at !== undefined && Date.now() - at < 20000);
}

function statusBadge(connection, engine) {
  if (isStopping(connection, engine)) return ["stopping", "warn"];
  const known = { RUNNING: ["running", "good"], DEPLOYING: ["loading", ""], UNHEALTHY: ["not well", "bad"] };
  return known[engine.status] || [engine.status.toLowerCase().replaceAll("_", " "), "bad"];
}

function updateEngine(root, item) {
  const { connection, engine } = item;
  root.item = item;
  const parts = root.parts;
  const alarm = engine.owner === "over" || engine.owner === "gone";
  root.classList.toggle("alarm", alarm);
  const serve = engine.application && dashboardUrl(connection, `serve/applications/${code(engine.application)}`);
  lead(parts.name, engine.name || "an engine", serve, true);
  const [words, kind] = statusBadge(connection, engine);
  set(parts.status, words);
  parts.status.className = `badge ${kind}`;
  parts.alarm.hidden = engine.owner === "alive";
  parts.alarm.className = alarm ? "badge warn" : "badge";
  set(parts.alarm, engine.owner === "alive" ? "" : OWNERS[engine.owner](engine));
  const linked = engine.owner === "alive" || engine.owner === "over";
  parts.owner.hidden = engine.dag_id === null;
  lead(parts.dag, engine.dag_id || "", linked || engine.owner === "command" ? dagUrl(engine.dag_id) : "");
  lead(parts.run, engine.run_id || "", linked ? runUrl(engine.dag_id, engine.run_id) : "");
  set(parts.model, engine.kind === "generate" ? engine.model : `${engine.model} (${engine.kind})`);
  set(parts.replicas, `${engine.replicas_running} of ${engine.replicas_wanted}${engine.replicas_max > engine.replicas_wanted ? `, at most ${engine.replicas_max}` : ""}`);
  set(parts.age, span(engine.age));
  const bound = engine.lease_bound === "max_lifetime" ? " (its greatest age)" : engine.tasks.length ? " when its tasks are done" : "";
  set(parts.lease, engine.lease_left === null ? "–" : span(engine.lease_left) + bound);
  const least = engine.gpu_seconds_at_least ? "at least " : "";
  set(parts.gpu, engine.gpu_seconds === null ? "–" : engine.gpu_seconds || engine.gpus ? `${least}${count(engine.gpu_seconds)} GPU s` : "no GPU");
  parts.cost.parentElement.hidden = engine.cost === null;
  set(parts.cost, engine.cost === null ? "" : `${least}${engine.cost.toLocaleString(undefined, { minimumFractionDigits: 2, maximumFractionDigits: 2 })}`);
  parts.message.hidden = !engine.message || engine.status === "RUNNING";
  set(parts.message, engine.message);
  parts.stop.hidden = !engine.application;
  parts.stop.disabled = !engine.may_stop || isStopping(connection, engine);
  parts.stop.title = engine.may_stop ? "" : engine.owner === "elsewhere" ? "It belongs to another Airflow." : "You may not change runs of its DAG.";
  caption(parts.stop, isStopping(connection, engine) ? "Stopping…" : "Stop", `${engine.name} of ${engine.dag_id}`);
  parts.tasks.hidden = !engine.tasks.length;
  reconcile(parts.tasks, engine.tasks.map((task, at) => ({ connection, task, at })), (one) => one.task.job || `#${one.at}`, makeTask, updateTask);
}

// ---- tasks --------------------------------------------------------------------------------------------------------

function makeTask() {
  const root = el("div", "task");
  const line = el("div", "task-line");
  const parts = {
    name: link(),
    bar: el("progress"),
    numbers: el("div", "numbers"),
    failures: el("span", "failures"),
    rest: el("span"),
    more: el("button"),
    panel: el("div", "panel"),
    about: link("job"),
    failed: el("div", "failed-rows"),
  };
  parts.more.type = "button";
  parts.panel.append(parts.about);
  parts.more.addEventListener("click", () => togglePanel(root));
  parts.numbers.append(parts.rest, parts.failures);
  line.append(parts.name, parts.bar, parts.numbers, parts.more);
  root.append(line, parts.panel, parts.failed);
  root.parts = parts;
  return root;
}

function updateTask(root, item) {
  const { connection, task } = item;
  root.item = item;
  const parts = root.parts;
  const name = task.task_id === null ? "a task" : task.map_index === null ? task.task_id : `${task.task_id} [${task.map_index}]`;
  lead(parts.name, name, taskUrl(task));
  const known = task.rows !== null && task.total !== null;
  parts.bar.hidden = task.rows === null && task.status === "PENDING";
  if (known) {
    parts.bar.max = Math.max(task.total, 1);
    parts.bar.value = task.total ? task.rows : 1;
  } else {
    parts.bar.removeAttribute("value");
  }
  const words = [];
  if (task.rows === null) {
    words.push(task.status === "PENDING" ? `waits to start${task.message ? `: ${task.message}` : ""}` : "begins");
  } else {
    words.push(`${count(task.rows)}${known ? ` of ${count(task.total)}` : ""} rows`);
    words.push(rate(task.rows_per_s, "rows/s"), rate(task.tokens_per_s, "tokens/s"));
    if (task.seconds_left !== null) words.push(`${span(task.seconds_left)} left`);
  }
  const failures = Object.entries(task.failures).sort((one, other) => other[1] - one[1]);
  set(parts.rest, words.filter(Boolean).join(" · "));
  set(parts.failures, failures.length ? ` · ${failures.map(([why, rows]) => `${count(rows)} ${why}`).join(", ")}` : "");
  parts.bar.setAttribute("aria-label", `Rows done of ${name}`);
  caption(parts.more, "Details", `of ${name}`);
  parts.more.hidden = !task.job;
  const key = panelKey(item);
  parts.more.setAttribute("aria-expanded", String(panels.has(key)));
  parts.panel.hidden = !panels.has(key);
  parts.failed.hidden = parts.panel.hidden || !parts.failed.hasChildNodes();
}

const panelKey = ({ connection, task }) => `${connection.conn_id} ${task.job}`;

function togglePanel(root) {
  const key = panelKey(root.item);
  if (panels.has(key)) {
    panels.delete(key);
  } else {
    panels.set(key, root);
    fillPanel(root);
  }
  updateTask(root, root.item);
}

async function fillPanel(root) {
  const { connection, task } = root.item;
  let history;
  try {
    const response = await fetch(`api/job?conn_id=${code(connection.conn_id)}&job=${code(task.job)}`);
    if (!response.ok) return;
    history = (await response.json()).history;
  } catch {
    return;
  }
  const panel = root.parts.panel;
  const points = (value) => history.slice(1).map((record, at) => {
    const seconds = record.at - history[at].at;
    return [record.at, seconds > 0 ? (value(record) - value(history[at])) / seconds : 0];
  });
  const failed = (record) => Object.values(record.failures).reduce((sum, rows) => sum + rows, 0);
  // The link stays the same element: somebody may be on it.
  for (const old of panel.querySelectorAll("figure")) old.remove();
  root.parts.about.before(
    plot("Rows per second", points((record) => record.rows), ""),
    plot("Tokens per second", points((record) => record.completion_tokens), ""),
    plot("Failed rows", history.map((record) => [record.at, failed(record)]), "bad"),
  );
  lead(root.parts.about, `Ray job ${task.job}`, dashboardUrl(connection, `jobs/${code(task.job)}`), true);
  const last = history[history.length - 1];
  if (last) showFailedRows(root.parts.failed, last.failed_rows, failed(last));
  updateTask(root, root.item);
}

function showFailedRows(box, rows, all) {
  const key = JSON.stringify([rows, all]);
  // Left alone where there is no news: somebody may be about to copy an id.
  if (box.dataset.shown === key) return;
  box.dataset.shown = key;
  box.replaceChildren();
  if (!rows.length) return;
  const table = el("table");
  const head = el("tr");
  for (const title of ["Row id", "Reason", "Message"]) {
    const cell = el("th", "", title);
    cell.scope = "col";
    head.append(cell);
  }
  table.append(el("caption", "", all > rows.length ? `The first ${rows.length} of ${count(all)} failed rows` : "Failed rows"), head);
  for (const row of rows) {
    const line = el("tr");
    line.append(el("td", "", row.row_id), el("td", "", row.reason), el("td", "", row.message || "may quote the row"));
    line.lastChild.classList.toggle("quiet", !row.message);
    table.append(line);
  }
  const where = el("p", "quiet", "Nothing that could quote a row is shown here. Rows with their whole messages are in the quarantine of the task's output: ");
  where.append(el("code", "", "raylm quarantine PATH"));
  box.append(table, where);
}

function plot(title, points, kind) {
  const figure = el("figure");
  const caption = el("figcaption");
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 300 100");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("class", kind);
  const top = Math.max(...points.map(([, value]) => value), 0);
  const last = points.length ? points[points.length - 1][1] : null;
  const covered = points.length > 1 ? span(points[points.length - 1][0] - points[0][0]) : "";
  svg.setAttribute("aria-label", `${title}: now ${count(last, 1)}, at most ${count(top, 1)}`);
  caption.append(el("span", "", title), el("span", "", points.length > 1 ? `${count(last, 1)} now, ${count(top, 1)} at most, ${covered}` : "not enough told yet"));
  if (points.length > 1) {
    const [begin, end] = [points[0][0], points[points.length - 1][0]];
    const x = (at) => (300 * (at - begin)) / (end - begin || 1);
    const y = (value) => 96 - (92 * value) / (top || 1);
    const curve = points.map(([at, value]) => `${x(at).toFixed(1)},${y(value).toFixed(1)}`);
    const shape = (tag, className, coordinates) => {
      const made = document.createElementNS(SVG, tag);
      made.setAttribute("class", className);
      made.setAttribute("points", coordinates.join(" "));
      svg.append(made);
    };
    shape("polygon", "area", ["0,100", ...curve, "300,100"]);
    shape("polyline", "curve", curve);
  }
  figure.append(caption, svg);
  return figure;
}

// ---- connections --------------------------------------------------------------------------------------------------

function makeConnection() {
  const root = el("section");
  const head = el("div", "connection-head");
  const parts = {
    name: el("h2"),
    about: el("span", "quiet"),
    dashboard: link(),
    trouble: el("div", "box trouble"),
    what: el("strong"),
    why: el("span"),
    empty: el("div", "box"),
    engines: el("div", "engines"),
  };
  head.append(parts.name, parts.about, parts.dashboard);
  parts.trouble.append(parts.what, parts.why);
  root.append(head, parts.trouble, parts.empty, parts.engines);
  root.parts = parts;
  return root;
}

function fits(engine, wanted) {
  return !wanted || [engine.name, engine.dag_id, engine.run_id, engine.model].some((text) => text && text.toLowerCase().includes(wanted));
}

function updateConnection(root, connection) {
  const parts = root.parts;
  const wanted = byId("filter").value.trim().toLowerCase();
  const engines = connection.engines.filter((engine) => fits(engine, wanted));
  const failing = !["ok", "looking"].includes(connection.state);
  const old = failing && connection.seen_at !== null;
  set(parts.name, connection.conn_id);
  const seen = old ? `, as seen ${span(Date.now() / 1000 + skew - connection.seen_at)} ago` : "";
  set(parts.about, connection.seen_at === null ? "" : many(connection.engines.length, "engine", "engines") + seen);
  lead(parts.dashboard, connection.dashboard_url ? "Ray dashboard" : "", dashboardUrl(connection, ""), true);
  root.classList.toggle("stale", old);
  parts.trouble.hidden = !failing;
  set(parts.what, STATES[connection.state] || "");
  set(parts.why, connection.trouble);
  parts.empty.hidden = failing || engines.length > 0;
  set(parts.empty, connection.state === "looking" ? STATES.looking : connection.engines.length ? "No engine fits the filter." : "No engine is up on this cluster. A DAG's deploy task brings one up.");
  reconcile(parts.engines, engines.map((engine, at) => ({ connection, engine, at })), (one) => one.engine.application || `#${one.at}`, makeEngine, updateEngine);
}

function notice(title, words, href, label) {
  const box = byId("notice");
  const key = JSON.stringify([title, words, href, label]);
  // Left alone where there is no news: it would be read out again, and somebody may be on its link.
  if (box.dataset.shown === key) return;
  box.dataset.shown = key;
  box.hidden = !title;
  box.className = "box";
  box.replaceChildren();
  if (!title) return;
  box.append(el("strong", "", title), el("span", "", words));
  if (href) {
    const made = link();
    lead(made, label, href);
    box.append(" ", made);
  }
}

function draw() {
  const connections = answer ? answer.connections : [];
  const engines = connections.flatMap((connection) => connection.engines);
  byId("filter").hidden = engines.length < 2;
  reconcile(byId("connections"), connections, (one) => one.conn_id, makeConnection, updateConnection);
  if (!answer) {
    set(byId("summary"), "");
    return;
  }
  const left = engines.filter((engine) => ["over", "gone"].includes(engine.owner)).length;
  const tasks = engines.reduce((sum, engine) => sum + engine.tasks.length, 0);
  const words = [many(engines.length, "engine", "engines"), many(tasks, "task at work", "tasks at work")];
  if (left) words.push(`${count(left)} without a running run`);
  set(byId("summary"), words.join(" · "));
}

// ---- stopping -----------------------------------------------------------------------------------------------------

let toStop = null;

function confirmStop(connection, engine) {
  toStop = { connection, engine };
  set(byId("confirm-what"), `${engine.name} (${engine.model}) of ${engine.dag_id} › ${engine.run_id}, on ${connection.conn_id}.`);
  const tasks = engine.tasks.length;
  byId("confirm-tasks").hidden = !tasks;
  byId("confirm-wait").checked = true;
  set(byId("confirm-tasks"), tasks ? `${many(tasks, "task works", "tasks work")} on it. Without waiting, ${tasks === 1 ? "it fails" : "they fail"}; a retry continues with the missing rows.` : "");
  byId("confirm-error").hidden = true;
  byId("confirm-yes").disabled = false;
  byId("confirm").showModal();
}

async function stopNow() {
  const { connection, engine } = toStop;
  const button = byId("confirm-yes");
  button.disabled = true;
  try {
    const response = await fetch("api/stop", {
      method: "POST",
      headers: { "Content-Type": "application/json", "X-RayLM-Action": "stop" },
      body: JSON.stringify({
        conn_id: connection.conn_id,
        application: engine.application,
        // Also where none was at work when this page looked: one may have begun since.
        on_busy: byId("confirm-wait").checked ? "wait" : "delete",
      }),
    });
    if (!response.ok) throw new Error(await reason(response));
    asked.set(`${connection.conn_id} ${engine.application}`, Date.now());
    byId("confirm").close();
    draw();
    poll();
  } catch (error) {
    byId("confirm-error").hidden = false;
    set(byId("confirm-error"), error.message);
    button.disabled = false;
  }
}

async function reason(response) {
  try {
    const { detail } = await response.json();
    return typeof detail === "string" ? detail : `Airflow answers ${response.status}.`;
  } catch {
    return `Airflow answers ${response.status}.`;
  }
}

// ---- polling ------------------------------------------------------------------------------------------------------

async function poll() {
  clearTimeout(timer);
  const mine = ++polls;
  try {
    const response = await fetch("api/engines", { cache: "no-store" });
    const told = response.ok ? await response.json() : null;
    if (mine !== polls) return;
    if (told) {
      answer = told;
      skew = told.at - Date.now() / 1000;
      const none = !told.connections.length;
      notice(none ? "No connection to a Ray cluster" : "", "This Airflow has no connection of the type raylm that you may see. Make one under Admin › Connections.");
    } else if (response.status === 401) {
      answer = null;
      notice("You are logged out", "Log in, and come back.", "../", "Log in");
    } else if (response.status === 403) {
      answer = null;
      notice("You may not see the engines", "It takes the permission to read Airflow's plugins. Ask whoever administers this Airflow.");
    } else {
      notice("Airflow does not answer as it should", `${await reason(response)} Trying again.`);
    }
  } catch {
    if (mine !== polls) return;
    notice("Airflow does not answer", "What is below is what was there before. Trying again.");
  }
  draw();
  for (const [key, root] of panels) {
    if (root.isConnected) fillPanel(root);
    else panels.delete(key);
  }
  timer = setTimeout(poll, document.hidden ? HIDDEN_MS : POLL_MS);
}

// ---- light and dark -----------------------------------------------------------------------------------------------

function followTheme() {
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  let around = null;
  try {
    if (window.parent !== window) around = window.parent.document.documentElement;
  } catch {
    around = null;
  }
  const apply = () => {
    const told = around && (around.classList.contains("dark") || around.classList.contains("light"));
    document.documentElement.classList.toggle("dark", told ? around.classList.contains("dark") : system.matches);
  };
  system.addEventListener("change", apply);
  if (around) new MutationObserver(apply).observe(around, { attributes: true, attributeFilter: ["class"] });
  apply();
}

followTheme();
byId("filter").addEventListener("input", draw);
byId("confirm-no").addEventListener("click", () => byId("confirm").close());
byId("confirm-yes").addEventListener("click", stopNow);
document.addEventListener("visibilitychange", () => document.hidden || poll());
poll();
