// Compare: one text, or one prompt, under up to five checkpoints; losses token by token, and over the steps of a series.
import { h, get, post, put, guarded, tip, Plot, color, models, noModel, noted, bySource, newest, nameOf, field, tokens, difference, surprise, visible } from "./page.js";

const MOST = 5, WAIT = 120; // ms that a slider rests before its step is asked for

export async function compareView(main, q) {
	const list = await models(), sources = bySource(list);
	if (!list.length) return noModel(main, "Compare");
	const last = newest(list), ladder = sources[list.at(-1).source];
	let names = (q.get("models") || "").split(",").map(n => nameOf(list, n)).filter(Boolean).slice(0, MOST);
	if (!names.length) names = [...new Set([ladder[Math.floor((ladder.length - 1) / 2)].name, last])];
	let mode = q.get("mode") === "write" ? "write" : "score", turn = 0, running = null;
	const cache = new Map();
	const input = h("textarea", { id: "text", rows: 4, value: q.get("text") ?? "", spellcheck: "false", oninput: () => later() });
	const slots = h("div"), panels = h("div.cols", { id: "panels", "aria-live": "polite" }), curve = h("figure.small", { hidden: true });
	const canvas = h("canvas", { role: "img" }), plot = new Plot(canvas, tip);
	curve.append(h("figcaption", "loss of this text over the steps ", h("span", "nats per token")), canvas);
	const radio = (v, t) => h("label.check", { for: "m-" + v }, h("input", { type: "radio", name: "mode", id: "m-" + v, checked: mode === v, onchange: () => { mode = v; put({ mode: v === "write" ? v : null }); show(); } }), t);
	const all = h("button", { onclick: guarded(() => series()) }, "Loss over all steps");
	main.replaceChildren(h("h1", "Compare"),
		h("p.hint", "Green: the checkpoint expects the token more than A does; red: less. What did the steps between two checkpoints teach?"),
		h("div.bar", { role: "radiogroup", "aria-label": "What to compare" }, radio("score", "losses of a text"), radio("write", "continuations of a prompt, the likeliest tokens")),
		field("text", input), slots, h("div.bar", h("button.main", { onclick: () => show() }, "Compare"), all), panels, curve);

	const anew = () => { drawSlots(); show(); };
	function drawSlots() {
		slots.replaceChildren(...names.map((name, i) => {
			const entry = list.find(e => e.name === name), steps = sources[entry.source], at = steps.indexOf(entry), letter = "ABCDE"[i];
			const label = h("span.hint", entry.step == null ? "" : `step ${entry.step}`);
			const slider = steps.length > 1 ? h("input", { type: "range", id: "s" + i, min: 0, max: steps.length - 1, value: at, "aria-valuetext": `step ${entry.step}`,
				oninput: e => { const to = steps[+e.target.value]; names[i] = to.name; label.textContent = `step ${to.step}`; e.target.setAttribute("aria-valuetext", `step ${to.step}`); later(); } }) : null;
			return h("div.bar", { style: "margin:.2rem 0" }, h("b", { style: `color:${color(i)}` }, letter),
				h("select", { "aria-label": `checkpoints of ${letter}`, onchange: e => { names[i] = sources[e.target.value].at(-1).name; anew(); } }, Object.keys(sources).map(s => h("option", { value: s, selected: s === entry.source }, s))),
				slider && h("div.field", { style: "flex:1 1 14rem" }, h("label", { for: "s" + i }, `steps of ${letter}: `, label), slider),
				names.length > 1 && h("button", { "aria-label": `leave out ${letter}`, onclick: () => { names.splice(i, 1); anew(); } }, "×"));
		}), names.length < MOST ? h("button", { onclick: () => { names.push(last); anew(); } }, "Add a checkpoint") : "", " ", h("button", { onclick: () => {
			const s = sources[list.find(e => e.name === names[0]).source];
			names = [...new Set([0, 1, 2, 3, 4].map(i => s[Math.round(i * (s.length - 1) / 4)].name))]; drawSlots(); show();
		} }, "Five steps of A's run"));
	}
	let timer = null;
	const later = () => { clearTimeout(timer); timer = setTimeout(() => show(), WAIT); };
	const remember = () => put({ models: names.join(","), text: input.value });

	async function scored(model, text, signal) {
		const id = JSON.stringify([model, text]);
		if (!cache.has(id)) {
			const [pieces, score] = await Promise.all([post("/api/pieces", { model, text }, signal), post("/v1/score", { model, input: text }, signal)]);
			cache.set(id, { ...pieces, nll: score.data[0].nll });
		}
		return cache.get(id);
	}
	async function written(model, prompt, signal) {
		const id = JSON.stringify([model, prompt, 1]);
		if (!cache.has(id)) {
			const c = (await post("/v1/completions", { model, prompt, temperature: 0, logprobs: 0 }, signal)).choices[0].logprobs, d = new TextDecoder();
			cache.set(id, { given: prompt, texts: c.bytes.map(b => d.decode(new Uint8Array(b), { stream: true })), nll: c.token_logprobs.map(v => -v) });
		}
		return cache.get(id);
	}
	const mean = nll => { const known = nll.filter(v => v != null); return known.reduce((a, b) => a + b, 0) / known.length; };
	const show = guarded(async () => {
		const mine = ++turn, text = input.value;
		running?.abort(); running = new AbortController();
		remember(); all.hidden = mode === "write";
		if (!text) { panels.replaceChildren(h("p.soft", "Write a text above.")); return; }
		for (const p of panels.children) p.style.opacity = .55;
		const found = [];
		for (const n of names) { found.push(await (mode === "score" ? scored : written)(n, text, running.signal)); if (mine !== turn) return; }
		const a = found[0];
		panels.replaceChildren(...found.map((f, i) => panel(f, i, a)));
	});
	function panel(f, i, a) {
		const same = mode === "score" && i && f.ids.length === a.ids.length && f.ids.every((t, k) => t === a.ids[k]);
		const box = tokens(h("div.text", { role: "group", "aria-label": `text under ${names[i]}` }, f.given && h("span.given", f.given)));
		f.texts.forEach((t, k) => {
			const v = f.nll[k], d = same ? v - a.nll[k] : null;
			const told = () => h("div", h("div", visible(t)), v == null ? "the first token is predicted by nothing" : h("div.soft", `loss ${v.toFixed(3)}, probability ${Math.exp(-v).toPrecision(2)}`, same ? h("div", `A: ${a.nll[k].toFixed(3)}; ${d <= 0 ? "" : "+"}${d.toFixed(3)}`) : ""));
			box.append(h("span.tok", { tabindex: k ? -1 : 0, style: v == null ? "" : same ? difference(d) : surprise(Math.exp(-v)), ...noted(told) }, t));
		});
		const m = mean(f.nll), gap = same ? m - mean(a.nll) : null;
		return h("figure", h("figcaption", h("span", { style: `color:${color(i)};font-weight:600` }, "ABCDE"[i] + " "), names[i] + " ", f.nll.some(v => v != null) && h("span", `loss ${m.toFixed(4)}`, gap == null ? "" : `, ${gap > 0 ? "+" : ""}${gap.toFixed(4)} beside A`)), box);
	}
	async function series() {
		const text = input.value, mine = ++turn, lines = [...new Set(names.map(n => list.find(e => e.name === n).source))].map((source, i) => ({ name: source, color: color(i), x: [], y: [], points: sources[source].length < 40 }));
		if (!text) return;
		running?.abort(); running = new AbortController();
		curve.hidden = false; remember();
		for (const line of lines) for (const e of sources[line.name]) {
			const f = await scored(e.name, text, running.signal);
			if (mine !== turn) return;
			line.x.push(e.step ?? 0); line.y.push(mean(f.nll));
			const steps = line.x.filter(x => x > 0);
			plot.set({ series: lines, xLabel: "step", logX: steps.length > 3 && Math.max(...steps) > 50 * Math.min(...steps), empty: "reading checkpoints …" });
			canvas.setAttribute("aria-label", lines.map(l => `${l.name}: ${l.y.length} steps`).join("; "));
		}
	}
	drawSlots();
	if (input.value) show(); else panels.replaceChildren(h("p.soft", "Write a text above."));
	return () => { turn = -1; clearTimeout(timer); running?.abort(); };
}
