"use strict";
// Everything is set as text, never as markup: a completion that holds <script> stays a text.
(() => {
  const $ = (id) => document.getElementById(id);
  const data = (id) => JSON.parse($(id).textContent);
  const matrices = data("data-matrices"), samples = data("data-samples");
  const PAGE = 20;

  function element(tag, className, text) {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  }
  function options(select, values, labels, chosen) {
    values.forEach((value, i) => {
      const option = element("option", "", labels[i]);
      option.value = value;
      option.selected = value === chosen;
      select.append(option);
    });
  }
  const PVALUES = {
    primary: "(the primary comparison)", secondary: "(Holm, the verdict's other figures)", exploratory: "(Holm, exploratory)",
  };
  const spaced = (name) => name.replaceAll("_", " ");

  // --- the matrix ---------------------------------------------------------------------------------------------
  const judges = Object.keys(matrices.judges);
  function colour(rate, unsure) {
    const distance = Math.min(1, Math.abs(rate - 0.5) * 2);
    // Never so dark that black text on it is hard to read.
    const strength = unsure ? 0.05 : 0.12 + 0.48 * distance;
    return `rgba(var(--${rate >= 0.5 ? "blue" : "orange"}), ${strength.toFixed(3)})`;
  }
  function drawMatrix() {
    const judge = $("matrix-judge").value, controlled = $("matrix-lc").checked;
    const table = $("matrix-table"), rates = matrices.judges[judge], names = matrices.names;
    const head = element("tr");
    head.append(element("td"));
    names.forEach((name) => { const th = element("th", "", matrices.labels[name]); th.scope = "col"; head.append(th); });
    const thead = element("thead"), tbody = element("tbody");
    thead.append(head);
    names.forEach((row) => {
      const tr = element("tr"), th = element("th", "", matrices.labels[row]);
      th.scope = "row";
      tr.append(th);
      names.forEach((column) => {
        const td = element("td"), found = (rates[row] || {})[column];
        if (row === column || !found) {
          td.append(element("div", "self", row === column ? "·" : "–"));
        } else {
          const rate = controlled ? found.lc : found.wr, ci = controlled ? found.lc_ci : found.ci;
          if (rate === null) {
            td.append(element("div", "self", "–"));
          } else {
            const unsure = found.p === null || found.p > matrices.alpha + 1e-9;
            const button = element("button", unsure ? "unsure" : "", (100 * rate).toFixed(1));
            button.type = "button";
            button.style.background = colour(rate, unsure);
            button.append(element("small", "", `${(100 * ci[0]).toFixed(0)}–${(100 * ci[1]).toFixed(0)}`));
            const says = `${matrices.labels[row]} against ${matrices.labels[column]}: ${(100 * rate).toFixed(1)} % ` +
              `[${(100 * ci[0]).toFixed(1)}, ${(100 * ci[1]).toFixed(1)}], ties ${(100 * found.ties).toFixed(1)} %` +
              (found.p === null ? "" : `, p ${found.p < 0.0001 ? "< 0.0001" : found.p.toFixed(4)} ${PVALUES[found.family] || "after Holm"}`) +
              (found.raw && !controlled ? `; fresh draws alone ${(100 * found.raw.wr).toFixed(1)} %` : "") +
              (found.allowed === null || controlled ? "" : `; KL allows ${(100 * found.allowed).toFixed(1)} points from 50`);
            button.title = says;
            button.setAttribute("aria-label", says);
            button.addEventListener("click", () => {
              $("matrix-note").textContent = says;
              if (position[row] !== undefined && position[column] !== undefined) {
                $("left").value = row; $("right").value = column;
                if (samples.judges.includes(judge)) $("judge").value = judge;
                update(true);
                $("reader").scrollIntoView();
                // Who reads by keyboard is with the completions now; Escape leads back to the cell.
                cell = [row, column];
                $("rows").focus({ preventScroll: true });
              }
            });
            button.dataset.row = row;
            button.dataset.column = column;
            td.append(button);
          }
        }
        tr.append(td);
      });
      tbody.append(tr);
    });
    table.replaceChildren(thead, tbody);
    // One stop for Tab, arrow keys within.
    const buttons = [...table.querySelectorAll("button")];
    buttons.forEach((button, i) => { button.tabIndex = i ? -1 : 0; });
  }
  let cell = null;
  const STEPS = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] };
  function focusCell(button) {
    $("matrix-table").querySelectorAll("button").forEach((one) => { one.tabIndex = one === button ? 0 : -1; });
    button.focus();
  }
  $("matrix-table").addEventListener("keydown", (event) => {
    const step = STEPS[event.key], button = event.target.closest("button");
    if (!step || !button) return;
    event.preventDefault();
    const names = matrices.names, size = names.length;
    let row = names.indexOf(button.dataset.row), column = names.indexOf(button.dataset.column);
    for (row += step[0], column += step[1]; row >= 0 && column >= 0 && row < size && column < size; row += step[0], column += step[1]) {
      const next = $("matrix-table").tBodies[0].rows[row].cells[column + 1].querySelector("button");
      if (next) { focusCell(next); return; }
    }
  });
  $("reader").addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !cell || event.target.id === "search") return;
    const back = [...$("matrix-table").querySelectorAll("button")].find((one) => one.dataset.row === cell[0] && one.dataset.column === cell[1]);
    if (back) focusCell(back);
  });

  // --- the reader ---------------------------------------------------------------------------------------------
  const position = {};
  samples.policies.forEach((policy, i) => { position[policy.name] = i; });
  const lower = { prompts: samples.prompts.map((text) => text.toLowerCase()), policies: {} };
  const lowered = (i) => (lower.policies[i] = lower.policies[i] || samples.policies[i].texts.map((text) => text.toLowerCase()));
  let shown = [], page = 0;

  function gap(judge, left, right, row) {
    const a = samples.policies[left].scores[judge], b = samples.policies[right].scores[judge];
    if (!a || !b || a[row] === null || b[row] === null) return NaN;
    return a[row] - b[row];
  }
  function update(reset) {
    const left = position[$("left").value], right = position[$("right").value];
    const judge = $("judge").value, filter = $("filter").value, order = $("order").value;
    const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const one = samples.policies[left], two = samples.policies[right];
    const leftTexts = words.length ? lowered(left) : null, rightTexts = words.length ? lowered(right) : null;
    shown = [];
    let wins = 0, losses = 0, ties = 0;
    for (let row = 0; row < samples.prompts.length; row++) {
      const difference = gap(judge, left, right, row);
      if (filter === "left" && !(difference > 0)) continue;
      if (filter === "right" && !(difference < 0)) continue;
      if (filter === "ties" && difference !== 0) continue;
      if (filter === "unfinished" && one.finished[row] && two.finished[row]) continue;
      if (filter === "disagree") {
        const signs = new Set(samples.judges.map((name) => Math.sign(gap(name, left, right, row))).filter((s) => !Number.isNaN(s)));
        if (signs.size < 2) continue;
      }
      if (words.length) {
        const matches = (word) => lower.prompts[row].includes(word) || leftTexts[row].includes(word) || rightTexts[row].includes(word);
        if (!words.every(matches)) continue;
      }
      if (difference > 0) wins++; else if (difference < 0) losses++; else if (difference === 0) ties++;
      shown.push(row);
    }
    const by = {
      margin: (a, b) => gap(judge, left, right, b) - gap(judge, left, right, a),
      loss: (a, b) => gap(judge, left, right, a) - gap(judge, left, right, b),
      longest: (a, b) => Math.max(one.tokens[b], two.tokens[b]) - Math.max(one.tokens[a], two.tokens[a]),
    }[order];
    if (by) shown.sort((a, b) => by(a, b) || a - b);
    if (reset) page = 0;
    $("reader-status").textContent = `${shown.length} of ${samples.prompts.length} prompts: ${one.label} wins ${wins}, ` +
      `${two.label} wins ${losses}, ties ${ties} (one completion each, by ${spaced(judge || "no judge")})`;
    drawPage();
  }
  function side(policy, row, difference) {
    const box = element("div", "side"), facts = element("p", "facts");
    const verdict = difference > 0 ? ["won", "✓ wins"] : difference < 0 ? ["lost", "✗ loses"] : difference === 0 ? ["", "= ties"] : ["", ""];
    facts.append(element("strong", "", policy.label), " ", element("span", verdict[0], verdict[1]));
    const figures = samples.judges.filter((name) => policy.scores[name]).map((name) => `${spaced(name)} ${policy.scores[name][row] === null ? "–" : policy.scores[name][row].toFixed(2)}`);
    facts.append(` · ${figures.concat(`${policy.tokens[row]} tokens`).join(" · ")}${policy.finished[row] ? "" : " · unfinished"}`);
    box.append(facts, element("p", "text", policy.texts[row].trim() || "(empty)"));
    return box;
  }
  function drawPage() {
    const left = position[$("left").value], right = position[$("right").value], judge = $("judge").value;
    const pages = Math.max(1, Math.ceil(shown.length / PAGE));
    page = Math.min(Math.max(page, 0), pages - 1);
    const rows = shown.slice(page * PAGE, (page + 1) * PAGE).map((row) => {
      const item = element("li"), prompt = element("div", "prompt"), sides = element("div", "sides");
      prompt.append(element("span", "", `prompt ${row + 1} · ${samples.ids[row]}`), samples.prompts[row]);
      const difference = gap(judge, left, right, row);
      sides.append(side(samples.policies[left], row, difference), side(samples.policies[right], row, -difference));
      item.append(prompt, sides);
      return item;
    });
    $("rows").replaceChildren(...rows);
    $("page").textContent = `page ${page + 1} of ${pages}`;
    $("previous").disabled = page === 0;
    $("next").disabled = page >= pages - 1;
  }

  options($("matrix-judge"), judges, judges.map(spaced), judges.includes(matrices.first) ? matrices.first : judges[0]);
  $("matrix-judge").addEventListener("change", drawMatrix);
  $("matrix-lc").addEventListener("change", drawMatrix);
  if (judges.length) drawMatrix();

  const names = samples.policies.map((policy) => policy.name), labels = samples.policies.map((policy) => policy.label);
  const pick = (wanted, fallback) => (names.includes(wanted) ? wanted : names[Math.min(fallback, names.length - 1)]);
  options($("left"), names, labels, pick("ppo", 1));
  options($("right"), names, labels, pick("dpo", 0));
  options($("judge"), samples.judges, samples.judges.map(spaced), samples.judges.includes(matrices.first) ? matrices.first : samples.judges[0]);
  ["left", "right", "judge", "filter", "order"].forEach((id) => $(id).addEventListener("change", () => update(true)));
  let waiting = 0;
  $("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(() => update(true), 80); });
  $("previous").addEventListener("click", () => { page--; drawPage(); });
  $("next").addEventListener("click", () => { page++; drawPage(); });
  if (names.length) update(true);
})();
