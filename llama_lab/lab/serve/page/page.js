"use strict";
// The page of `llama-lab serve`: asks /v1/completions for each column, and writes what streams back into it.

const MOST_COLUMNS = 6;
const at = (id) => document.getElementById(id);
const columns = at("columns");
let models = [];
let running = null; // what ends the requests that are under way

function shownTokens(count) {
  for (const [size, unit] of [[1e9, "B"], [1e6, "M"], [1e3, "K"]]) if (count >= 5 * size) return Math.round(count / size) + unit;
  return String(count);
}

function fillSelect(select, chosen) {
  select.replaceChildren();
  for (const run of new Set(models.map((model) => model.run))) {
    const group = document.createElement("optgroup");
    group.label = run;
    for (const model of models.filter((model) => model.run === run)) {
      const option = new Option(`update ${model.update} · ${shownTokens(model.tokens)} tokens · ${run.split("-").pop()}`, model.id);
      option.selected = model.id === chosen;
      group.append(option);
    }
    select.append(group);
  }
}

function addColumn(chosen) {
  const column = at("column").content.cloneNode(true).firstElementChild;
  const select = column.querySelector("select");
  const name = () => (column.querySelector(".run").textContent = models.find((model) => model.id === select.value).run);
  fillSelect(select, chosen);
  select.addEventListener("change", name);
  name();
  column.querySelector(".remove").addEventListener("click", () => {
    column.remove();
    tidy();
  });
  columns.append(column);
  tidy();
}

function tidy() {
  const count = columns.children.length;
  for (const button of columns.querySelectorAll(".remove")) button.disabled = count === 1 || running !== null;
  at("add").disabled = count >= MOST_COLUMNS || running !== null;
  at("go").disabled = running !== null;
  at("end").disabled = running === null;
}

// Each run's newest checkpoint; of a single run its newest and its oldest.
function firstChoices() {
  const newest = [...new Map([...models].reverse().map((model) => [model.run, model.id])).values()].reverse();
  if (newest.length === 1 && models.length > 1) newest.push(models[models.length - 1].id);
  return newest.slice(0, 4);
}

function options() {
  const number = (id) => (at(id).value === "" ? undefined : Number(at(id).value));
  const found = { max_tokens: number("max_tokens"), stream: true, stream_options: { include_usage: true } };
  for (const id of ["temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"]) found[id] = number(id);
  if (at("stop").value !== "") found.stop = [at("stop").value];
  if (at("window").checked) found.beyond_context = "window";
  return found;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
  }
}

// Shows what was written at most once a frame: laying out a long text for each token would leave the page no time for a click.
function painter(text, given) {
  const written = document.createTextNode("");
  text.replaceChildren(given, written);
  let unseen = "";
  let frame = null;
  function paint() {
    frame = null;
    const follows = text.scrollTop + text.clientHeight >= text.scrollHeight - 4;
    written.data += unseen;
    unseen = "";
    if (follows) text.scrollTop = text.scrollHeight;
  }
  return {
    add(more) {
      unseen += more;
      frame ??= requestAnimationFrame(paint);
    },
    // A tab in the background has no frames: what is left is shown when the text is complete.
    finish() {
      if (frame !== null) cancelAnimationFrame(frame);
      paint();
    },
  };
}

async function fill(column, prompt, asked, signal) {
  const text = column.querySelector(".text");
  const status = column.querySelector(".status");
  const model = column.querySelector("select").value;
  const given = document.createElement("span");
  given.className = "given";
  given.textContent = prompt;
  const shown = painter(text, given);
  status.className = "status";
  status.textContent = "waiting…";
  let started = null;
  let usage = null;
  let finish = "";
  try {
    const response = await fetch("/v1/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ model, prompt, ...asked }),
      signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      started ??= performance.now();
      for (const choice of event.choices) {
        shown.add(choice.text);
        finish = choice.finish_reason ?? finish;
      }
      if (event.usage) usage = event.usage;
      if (status.textContent !== "writing…") status.textContent = "writing…";
    }
    shown.finish();
    const seconds = (performance.now() - started) / 1000;
    const speed = usage.completion_tokens > 1 ? `, ${Math.round((usage.completion_tokens - 1) / Math.max(seconds, 1e-3))} a second` : "";
    const why = finish === "stop" ? "ended by itself" : "as many as it may have";
    status.textContent = `${usage.completion_tokens} tokens${speed}; ${why}`;
  } catch (error) {
    shown.finish();
    const ended = error.name === "AbortError";
    status.textContent = ended ? "stopped" : error instanceof TypeError ? "the server does not answer" : error.message;
    status.className = ended ? "status" : "status wrong";
  }
}

async function ask() {
  if (running !== null) return;
  running = new AbortController();
  tidy();
  const prompt = at("prompt").value;
  const asked = options();
  await Promise.all([...columns.children].map((column) => fill(column, prompt, asked, running.signal)));
  running = null;
  tidy();
  at("prompt").focus({ preventScroll: true });
}

async function load() {
  try {
    models = (await (await fetch("/v1/models")).json()).data;
    at("notice").textContent = "";
  } catch {
    at("notice").textContent = "The server does not answer; is llama-lab serve still running?";
  }
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("ask").requestSubmit();
});
at("end").addEventListener("click", () => running?.abort());
at("add").addEventListener("click", async () => {
  await load(); // a run that is training has new ones by now
  const taken = [...columns.querySelectorAll("select")].map((select) => select.value);
  addColumn((models.find((model) => !taken.includes(model.id)) ?? models[0]).id);
});
load().then(() => firstChoices().forEach(addColumn));
