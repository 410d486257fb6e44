// A chat box: draws the `turns` trait, and from `live` the answer that is being written. All text goes in as text.
const NEAR_END = 60; // pixels: a reader this near the end wants to follow it
const SILENT_AFTER = 5000; // milliseconds without a word from the kernel

const settingsInWords = (settings) =>
  `temperature ${settings.temperature}, at most ${count(settings.max_new_tokens, "token")}, ${settings.system ? "a system prompt" : "no system prompt"}`;

function stats(answer) {
  if (answer.state === "waiting") return "waiting for its turn";
  if (answer.state === "writing" && !answer.tokens) return "reading the question …";
  const numbers = answer.tokens ? [count(answer.tokens, "token"), `${answer.tokens_per_second.toFixed(1)} tokens/s`] : [];
  return [...numbers, answer.note].filter(Boolean).join(", ");
}

function stepNodes(steps) {
  return steps.map((step) => element("li", {}, element("span", { class: "course-step-title" }, step.title), element("pre", { ...KEEP_KEYS, tabindex: "0" }, step.text)));
}

// One answer's card. `show` changes what has changed and leaves the rest, so that a selection or an unfolded list stays.
function answerCard(side) {
  const name = element("h4", { class: "course-chat-name" }, side);
  const summary = element("summary", KEEP_KEYS), list = element("ol");
  const steps = element("details", { class: "course-chat-steps" }, summary, list);
  const text = element("div", { class: "course-chat-text" }), numbers = element("p", { class: "course-note" });
  const node = element("article", { class: "course-chat-answer" }, name, steps, text, numbers);
  const put = (place, words) => { if (place.textContent !== words) place.textContent = words; };
  const show = (answer) => {
    node.dataset.state = answer.state;
    steps.hidden = answer.steps.length === 0;
    put(summary, `${count(answer.steps.length, "step")}: ${answer.steps.map((step) => step.title).join(", ")}`);
    while (list.children.length > answer.steps.length) list.lastChild.remove();
    stepNodes(answer.steps).forEach((step, i) => {
      if (!list.children[i]) list.append(step);
      else if (list.children[i].textContent !== step.textContent) list.children[i].replaceWith(step);
    });
    put(text, answer.text);
    put(numbers, stats(answer));
  };
  return { node, show };
}

function render({ model, el }) {
  const id = Math.random().toString(36).slice(2);
  const button = (label, attributes = {}) => element("button", { type: "button", class: "course-button", ...KEEP_KEYS, ...attributes }, label);
  const [send, stop, retry, reset] = [button("Send"), button("Stop"), button("Ask again"), button("Reset")];
  send.classList.add("course-primary");
  stop.classList.add("course-primary");

  const sides = model.get("sides");
  const heading = element("p", { class: "course-heading" }, sides.length > 1 ? `Chat: ${sides.join(" | ")}` : "Chat");
  const field = (label, input, hint = "") => element("label", {}, element("span", { class: "course-name" }, label), input, hint);
  const system = element("textarea", { rows: "2", ...KEEP_KEYS });
  const temperature = element("input", { type: "number", min: "0", max: "2", step: "0.1", ...KEEP_KEYS });
  const length = element("input", { type: "number", min: "1", step: "1", ...KEEP_KEYS });
  const use = button("Use from the next question on");
  const summary = element("summary", KEEP_KEYS);
  const settings = element(
    "details", { class: "course-chat-settings" }, summary,
    element("div", { class: "course-chat-form" }, field("System prompt (another one starts the conversation anew)", system), field("Temperature", temperature), field("Tokens an answer, at most", length), use),
  );
  const list = element("ol", { class: "course-chat-turns", tabindex: "0", "aria-label": "Conversation", ...KEEP_KEYS });
  const nothing = element("p", { class: "course-note course-chat-nothing" }, sides.length > 1 ? "Nothing said yet. Every question goes to all sides; they answer one after the other." : "Nothing said yet.");
  const problem = element("p", { class: "course-problem", role: "alert" });
  const box = element("textarea", { id: `course-ask-${id}`, rows: "2", placeholder: "Write a question", "aria-describedby": `course-keys-${id}`, ...KEEP_KEYS });
  const label = element("label", { class: "course-spoken", for: box.id }, "Your question");
  const keys = element("p", { class: "course-note", id: `course-keys-${id}` }, "Enter sends, Shift+Enter starts a new line, Esc stops.");
  const saves = sides.map((side) => {
    const save = button(sides.length > 1 ? `Save ${side}` : "Save", { title: "Download the conversation as a row of JSON Lines to train on" });
    save.addEventListener("click", () => order({ do: "save", side }));
    return save;
  });
  const spoken = element("p", { class: "course-spoken", role: "status", "aria-live": "polite" });
  const root = element(
    "section", { class: "course-widget course-chat", "aria-label": heading.textContent },
    element("div", { class: "course-chat-head" }, heading, settings),
    nothing, list, problem,
    element("div", { class: "course-chat-ask" }, label, box, send, stop),
    element("div", { class: "course-chat-foot" }, keys, element("div", { class: "course-chat-buttons" }, retry, reset, ...saves)),
    spoken,
  );
  list.style.setProperty("--course-sides", sides.length);

  const cards = []; // of the turns: {question, made: [{node, show}]}
  let asked = null, silence = 0;
  const busy = () => "side" in model.get("live");

  const order = (content) => {
    clearTimeout(silence);
    silence = setTimeout(() => {
      problem.textContent = "The kernel does not answer: a cell that runs holds it up, or it was restarted; then run this cell again.";
      asked = null;
      drawButtons();
    }, SILENT_AFTER);
    model.send(content);
  };
  const ask = () => {
    if (busy() || asked !== null || !box.value.trim()) return;
    asked = box.value;
    order({ do: "ask", text: asked });
    drawButtons();
  };
  const stopWriting = () => {
    spoken.textContent = "Stopping";
    order({ do: "stop" });
  };

  const drawButtons = () => {
    const writing = busy(), held = document.activeElement;
    root.dataset.busy = String(writing);
    send.hidden = writing;
    stop.hidden = !writing;
    send.disabled = asked !== null;
    retry.disabled = reset.disabled = writing || cards.length === 0;
    use.disabled = writing;
    for (const save of saves) save.disabled = cards.length === 0;
    if (held === send && writing) stop.focus();
    if (held === stop && !writing) box.focus();
  };
  const follow = (change) => {
    const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < NEAR_END;
    change();
    if (atEnd) list.scrollTop = list.scrollHeight;
  };
  const drawTurns = () => {
    const turns = model.get("turns");
    follow(() => {
      turns.forEach((turn, i) => {
        if (cards[i]?.question !== turn.question) {
          const made = sides.map(answerCard);
          const question = element("div", { class: "course-chat-question" }, element("h4", { class: "course-chat-name" }, "you"), element("div", { class: "course-chat-text" }, turn.question));
          const node = element("li", {}, question, element("div", { class: "course-chat-answers" }, ...made.map((card) => card.node)));
          if (cards[i]) cards[i].node.replaceWith(node);
          else list.append(node);
          cards[i] = { question: turn.question, node, made };
        }
        turn.answers.forEach((answer, side) => cards[i].made[side].show(answer));
      });
      for (const gone of cards.splice(turns.length)) gone.node.remove();
      nothing.hidden = turns.length > 0;
      list.hidden = turns.length === 0;
      showLive();
    });
    drawButtons();
  };
  const showLive = () => {
    const { side, answer } = model.get("live");
    if (answer && cards.length) cards[cards.length - 1].made[side].show(answer);
  };
  let wasBusy = busy();
  const drawLive = () => {
    follow(showLive);
    const now = busy();
    if (now !== wasBusy) {
      wasBusy = now;
      drawButtons();
      const last = model.get("turns").at(-1);
      // read out once, when it is whole: a region that speaks every token cannot be followed
      spoken.textContent = now || !last ? "Writing" : last.answers.map((answer, i) => [`${sides[i]}:`, answer.text, answer.note].join(" ")).join(" ");
    }
  };
  const drawSettings = () => {
    const now = model.get("settings");
    summary.textContent = `Settings: ${settingsInWords(now)}`;
    [system.value, temperature.value, length.value] = [now.system, now.temperature, now.max_new_tokens];
  };
  const drawProblem = () => { problem.textContent = model.get("problem"); };
  const receive = (content) => {
    if ("answered" in content) {
      clearTimeout(silence);
      drawProblem(); // takes "the kernel does not answer" away
      if (content.answered === "ask" && asked !== null) {
        if (!model.get("problem") && box.value === asked) box.value = ""; // what was refused stays, to be mended
        asked = null;
        drawButtons();
      }
      if (content.answered === "reset" && !model.get("problem")) spoken.textContent = "The conversation starts anew";
    } else if ("file" in content) {
      const link = element("a", { download: content.file, href: URL.createObjectURL(new Blob([content.text], { type: "application/jsonl" })) });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    }
  };

  box.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return; // composing: Enter picks a Chinese character
    event.preventDefault();
    ask();
  });
  root.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && busy()) {
      event.preventDefault();
      stopWriting();
    }
    event.stopPropagation(); // JupyterLab's own keys: Enter, Escape, arrows, letters
  });
  send.addEventListener("click", ask);
  stop.addEventListener("click", stopWriting);
  retry.addEventListener("click", () => order({ do: "retry" }));
  reset.addEventListener("click", () => order({ do: "reset" }));
  use.addEventListener("click", () => {
    const number = (input) => (input.value === "" ? "" : Number(input.value)); // Python says what is wrong with ""
    order({ do: "configure", settings: { system: system.value, temperature: number(temperature), max_new_tokens: number(length) } });
  });

  const listeners = { "change:turns": drawTurns, "change:live": drawLive, "change:settings": drawSettings, "change:problem": drawProblem, "msg:custom": receive };
  for (const [name, listener] of Object.entries(listeners)) model.on(name, listener);
  el.append(root);
  drawSettings();
  drawProblem();
  drawTurns();
  return () => {
    clearTimeout(silence);
    for (const [name, listener] of Object.entries(listeners)) model.off(name, listener);
  };
}
export default { render };
