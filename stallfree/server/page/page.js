// The page: asks the server four times a second what is new, and hands it to the charts, the table and the list. The conversation
// beside them only shares the key.

import { charts, duration, WINDOW_S } from "./charts.js";
import { Conversation } from "./conversation.js";
import { showDefaults } from "./settings.js";
import { adapters } from "./adapters.js";
import { tenants } from "./tenants.js";

const PERIOD_MS = 250;
const RETRY_MS = 1000;
const MOST_ROWS = 4000;

const $ = (id) => document.getElementById(id);
const sleep = (ms) => new Promise((wake) => setTimeout(wake, ms));

let key = null; // in memory only: a reload forgets it
const authorization = () => (key === null ? {} : { Authorization: `Bearer ${key}` });

async function watch(show) {
  let run = null;
  let since = -1;
  let rows = [];
  for (;;) {
    if (document.hidden) await shown();
    let response;
    let about;
    try {
      const headers = authorization();
      response = await fetch(`live?since=${since}`, { headers, signal: AbortSignal.timeout(5000) });
      if (response.ok) about = await response.json(); // it may break off in the middle, too
    } catch {
      status("trouble", "the server does not answer; trying again");
      await sleep(RETRY_MS);
      continue;
    }
    if (response.status === 401) {
      await askForKey();
      continue;
    }
    if (!response.ok) {
      status("trouble", `the server answered ${response.status}; trying again`);
      await sleep(RETRY_MS);
      continue;
    }
    if (about.run !== run) {
      const again = run !== null; // another server: the steps that were asked for follow one of the old server
      run = about.run;
      since = -1;
      rows = [];
      if (again) continue;
    }
    since = about.rows.at(-1)?.[0] ?? since;
    rows = [...rows, ...about.rows].filter((row) => row[2] > about.now - WINDOW_S - 1).slice(-MOST_ROWS);
    show(rows, about);
    if (!about.more) await sleep(PERIOD_MS);
  }
}

const shown = () =>
  new Promise((wake) => {
    status("waiting", "paused");
    document.addEventListener("visibilitychange", wake, { once: true });
  });

function askForKey() {
  status("waiting", key === null ? "needs a key" : "the key is wrong");
  $("key-form").hidden = false;
  $("key").focus();
  return new Promise((wake) => {
    $("key-form").onsubmit = (event) => {
      event.preventDefault();
      key = $("key").value;
      $("key").value = "";
      $("key-form").hidden = true;
      $("prompt").focus();
      wake();
    };
  });
}

function status(state, text) {
  if ($("status").textContent === text) return;
  $("status").dataset.state = state;
  $("status").textContent = text;
}

function facts(about) {
  status("live", about.running || about.waiting ? "live" : "idle");
  document.title = `${about.model} · stallfree`;
  $("model").textContent = about.model;
  $("policy").textContent = about.policy;
  $("slo").textContent = about.slo.replaceAll(",", ", ") || "none";
  $("context").textContent = `${about.max_model_len.toLocaleString("en")} tokens`;
  $("kv").textContent = `${about.num_blocks.toLocaleString("en")} blocks`;
}

function latency(about) {
  const { ttft, tbt, tpot } = about.targets;
  line($("ttft"), about.ttft, ttft);
  line($("tbt"), about.tbt, tbt ?? tpot);
  const counted = [about.ttft, about.tbt].map((times) => (times?.count ?? 0).toLocaleString("en"));
  $("latency-note").textContent = `of ${counted[0]} first tokens and ${counted[1]} others`;
  const forecast = about.forecast;
  $("forecast-note").textContent = forecast
    ? `first tokens came after ${forecast.p50.toFixed(2)} times the forecast (p50), ${forecast.p90.toFixed(2)} times (p90)`
    : "";
  const wait = about.longest_wait;
  $("wait-note").textContent = wait ? `${wait.id} has waited ${duration(wait.seconds)} for its first token` : "";
  $("wait-note").dataset.state = wait && wait.seconds > about.long_wait_s ? "trouble" : "";
}

function line(row, times, target) {
  const cells = row.querySelectorAll("td");
  ["p50", "p90", "p99"].forEach((name, i) => (cells[i].textContent = times ? duration(times[name]) : "–"));
  cells[3].textContent = times && target ? `${(100 * times.late).toFixed(1)} %` : "–";
  cells[3].dataset.state = !times || !target ? "" : times.late <= 1 - target.percentile / 100 ? "good" : "trouble";
  cells[3].title = target ? `at most ${(100 - target.percentile).toFixed(1)} % may take longer than ${duration(target.seconds)}` : "";
}

let listed = "";

function stalls(about) {
  const paced = about.targets.tbt ?? about.targets.tpot;
  $("stalls-note").textContent = about.stalls.length || about.waits.length
    ? ""
    : `No decode was left out${paced ? ", and no token was late" : ""}.${paced ? "" : " Tokens are late only where there is a target: --slo tbt=100ms."}`;
  const waits = about.waits.map((wait) => ({ ...wait, kind: "waited", gap_s: wait.seconds, count: 1 }));
  const all = [...about.stalls, ...waits].sort((a, b) => b.t - a.t);
  const now = JSON.stringify(all);
  if (now === listed) return; // so that text that is being selected stays
  listed = now;
  $("stalls").replaceChildren(...all.map((stall) => item(stall, about.now)));
}

function item(stall, now) {
  const at = new Date(Date.now() - (now - stall.t) * 1e3);
  const li = document.createElement("li");
  const head = document.createElement("p");
  const who = stall.count > 1 ? `${stall.id} +${(stall.count - 1).toLocaleString("en")}` : stall.id;
  const time = element("time", at.toLocaleTimeString("en", { hour12: false }));
  time.dateTime = at.toISOString();
  head.append(element("b", stall.kind), element("span", `${duration(stall.gap_s)} ${stall.kind === "waited" ? "to its first token" : "gap"}`), element("span", who), time);
  li.append(head, stall.words);
  return li;
}

function element(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

let served = null; // the run of the server whose defaults are shown

function defaults(about) {
  if (about.run === served) return;
  served = about.run;
  showDefaults(authorization());
}

const draw = charts();
new Conversation(authorization);
watch((rows, about) => {
  facts(about);
  defaults(about);
  draw(rows, about);
  latency(about);
  stalls(about);
  tenants(about);
  adapters(about);
});
