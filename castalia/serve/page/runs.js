// Runs: a table of all, curves of those that are chosen, their events, documents and settings.
import { h, dot, get, put, guarded, sent, problem, tip, Plot, color, short, smooth, field, sheet, choice } from "./page.js";

const NAMES = { lr: "learning rate", grad_norm: "gradient norm", tokens_per_second: "tokens per second", margin: "reward margin", accuracy: "accuracy", loss_scale: "loss scale", kl: "KL", skipped: "skipped steps" };
const LEFT_OUT = new Set(["step", "tokens", "seconds", "loss", "valid_loss", "valid_perplexity"]);
const LIVE = 2000, CALM = 5; // ms between two looks; so many times that while no run trains
const alive = run => run.state === "training" || run.state === "starting";
const words = s => s == null ? "–" : s < 90 ? `${Math.round(s)} s` : s < 5400 ? `${Math.round(s / 60)} min` : s < 172800 ? `${(s / 3600).toFixed(1)} h` : `${Math.round(s / 86400)} d`;

export async function runsView(main, q) {
	let runs = await get("runs"), gone = false;
	if (!runs.length) {
		main.replaceChildren(h("h1", "Runs"), h("p", "No run lies below the folders that are served. A run has metrics.jsonl; start one with ", h("code", "castalia train"), ", and it appears here."));
		return;
	}
	const chosen = new Set((q.get("run") ? q.get("run").split(",") : [(runs.find(alive) || runs.at(-1)).name]).filter(n => runs.some(r => r.name === n)));
	const look = { x: q.get("x") || "step", logx: q.has("logx"), logy: q.has("logy"), smooth: +(q.get("smooth") ?? 2) };
	const data = {}, facts = {}; // by run: columns, events and settings
	const hue = name => color(runs.findIndex(r => r.name === name));

	const body = h("tbody"), big = h("canvas", { role: "img" }), small = h("div.cols"), legend = h("div.legend");
	const log = h("div"), docs = h("div", { id: "docs", "aria-live": "polite" }), settings = h("div");
	const plot = new Plot(big, tip), plots = {};
	const set = changes => { Object.assign(look, changes); put({ x: look.x === "step" ? null : look.x, logx: look.logx && 1, logy: look.logy && 1, smooth: look.smooth === 2 ? null : look.smooth }); draw(); };
	const check = (id, label, name) => h("label.check", { for: id }, h("input", { type: "checkbox", id, checked: look[name], onchange: e => set({ [name]: e.target.checked }) }), label);
	main.replaceChildren(
		h("h1", "Runs"),
		sheet(h("thead", h("tr", ["run", "state", "step", "loss", "validation", "tokens/s", "left", "events"].map((t, i) => h(i > 1 && i < 7 ? "th.n" : "th", t)))), body),
		h("div.bar", { role: "group", "aria-label": "Axes" },
			choice("x", "across", [["step", "steps"], ["tokens", "tokens"], ["time", "time of training"]], look.x, x => set({ x })),
			choice("smooth", "smoothing", [[0, "none"], [2, "2 %"], [5, "5 %"], [10, "10 %"]], look.smooth, v => set({ smooth: +v })),
			check("logx", "logarithmic across", "logx"), check("logy", "logarithmic loss", "logy")),
		h("figure.big", h("figcaption", "loss ", h("span", "in nats per token; dots: validation; ▼ events")), big), legend, small, log, docs, settings);

	function table() {
		body.replaceChildren(...runs.map(r => h("tr", { class: chosen.has(r.name) ? "on" : "" },
			h("td", h("label.check", h("input", { type: "checkbox", checked: chosen.has(r.name), onchange: guarded(async e => { e.target.checked ? chosen.add(r.name) : chosen.delete(r.name); put({ run: [...chosen].join(",") }); table(); await load(); draw(); lists(); }) }),
				dot(hue(r.name)), h("span", r.label || r.name))),
			h("td", { class: r.state, title: r.message || r.by || "" }, r.state),
			h("td.n", r.step == null ? "–" : r.step.toLocaleString("en") + (r.steps ? " / " + r.steps.toLocaleString("en") : "")),
			h("td.n", r.loss == null ? "–" : r.loss.toFixed(4)), h("td.n", r.valid_loss == null ? "–" : r.valid_loss.toFixed(4)),
			h("td.n", short(r.tokens_per_second)), h("td.n", words(r.seconds_left)),
			h("td", Object.entries(r.events || {}).map(([k, n]) => `${n} ${k}`).join(", ") || "–"))));
	}
	async function load() {
		await Promise.all([...chosen].map(async name => {
			const old = data[name], after = old?.step.at(-1) || 0;
			const [m, f] = await Promise.all([get("metrics", { name, after }), get("run", { name })]);
			const starts = f.events.filter(e => e.event === "start" || e.event === "rewind").length;
			// A run that was started again has written its records after the checkpoint anew.
			const anew = old && (m.last < after || starts !== facts[name].starts);
			facts[name] = { ...f, starts };
			const cols = anew ? (await get("metrics", { name, after: 0 })).columns : m.columns, base = anew ? null : old;
			const n = base?.step.length || 0, more = cols.step?.length || 0, all = base || { step: [] };
			for (const k of Object.keys(cols)) { all[k] ||= new Array(n).fill(null); all[k].push(...cols[k]); }
			for (const k of Object.keys(all)) if (all[k].length < n + more) all[k].push(...new Array(n + more - all[k].length).fill(null));
			data[name] = all;
		}));
	}
	function across(d) {
		if (look.x === "tokens" && d.tokens) return [d.tokens, "tokens"];
		if (look.x === "time" && d.seconds) { let t = 0; const s = d.seconds.map(v => t += v || 0), [unit, size] = t > 7200 ? ["hours", 3600] : t > 120 ? ["minutes", 60] : ["seconds", 1]; return [s.map(v => v / size), unit]; }
		return [d.step, "step"];
	}
	function marks(names) {
		const css = n => getComputedStyle(document.documentElement).getPropertyValue(n).trim(), out = [];
		for (const name of names) {
			const d = data[name], [x] = across(d), place = step => { const i = d.step.findIndex(s => s >= step); return i < 0 ? x.at(-1) : x[i]; };
			for (const e of facts[name].events) {
				const kind = e.event, at = `at step ${e.step}`, mark = (hue, label, more) => out.push({ x: place(e.step), kind, color: css(hue), label: (names.length > 1 ? name + ": " : "") + label, ...more });
				if (kind === "save") mark("--soft", `saved ${at}`, { quiet: true });
				else if (kind === "evaluation") mark("--ink", `validation ${short(e.loss ?? e.accuracy)} ${at}`, { quiet: true });
				else if (kind === "start") e.step > 0 && mark("--soft", `started again after step ${e.step}`);
				else if (kind === "rewind") mark("--warn", `went back to step ${e.back_to}`);
				else if (["spike", "overflow", "error"].includes(kind)) mark("--bad", `${kind} ${at}; click for its documents`, { open: guarded(() => documents(name, e.step)) });
				else if (["tasks", "slow", "dead units"].includes(kind)) mark("--warn", `${kind} ${at}`);
			}
		}
		return out;
	}
	function draw() {
		const names = runs.map(r => r.name).filter(n => chosen.has(n) && data[n]?.step.length), series = [];
		let xLabel = "step";
		for (const name of names) {
			const d = data[name], [x, label] = across(d), window = Math.round(d.step.length * look.smooth / 100);
			xLabel = label;
			if (window > 1) series.push({ name, color: hue(name), x, y: d.loss, faint: true });
			series.push({ name, color: hue(name), x, y: smooth(d.loss, window) });
			if (d.valid_loss) { const at = d.valid_loss.flatMap((v, i) => v == null ? [] : [i]); series.push({ name: `${name}, validation`, color: hue(name), x: at.map(i => x[i]), y: at.map(i => d.valid_loss[i]), points: true }); }
		}
		const events = marks(names);
		plot.set({ series, marks: events, xLabel, logX: look.logx, logY: look.logy });
		big.setAttribute("aria-label", "Curves of loss: " + (names.map(n => `${n} ends at ${short(data[n].loss?.at(-1))} after ${data[n].step.at(-1)} steps`).join("; ") || "no run is chosen"));
		legend.replaceChildren(...names.map(n => h("span", dot(hue(n)), n)));
		const measures = [...new Set(names.flatMap(n => Object.keys(data[n])))].filter(k => !LEFT_OUT.has(k) && !k.startsWith("valid_")).sort((a, b) => Object.keys(NAMES).indexOf(a) - Object.keys(NAMES).indexOf(b));
		for (const k of Object.keys(plots)) if (!measures.includes(k)) { plots[k].figure.remove(); delete plots[k]; }
		for (const k of measures) {
			if (!plots[k]) {
				const canvas = h("canvas", { role: "img", "aria-label": `Curves of ${NAMES[k] || k}` });
				plots[k] = { figure: h("figure.small", h("figcaption", NAMES[k] || k), canvas), plot: new Plot(canvas, tip) };
				small.append(plots[k].figure);
			}
			const lines = names.filter(n => data[n][k]).map(n => ({ name: n, color: hue(n), x: across(data[n])[0], y: data[n][k] }));
			const values = lines.flatMap(s => s.y.filter(v => v > 0)), wide = k === "grad_norm" && Math.max(...values.slice(0, 4000)) > 30 * Math.min(...values.slice(0, 4000));
			plots[k].plot.set({ series: lines, xLabel, logX: look.logx, logY: wide });
		}
	}
	function lists() {
		const names = [...chosen].filter(n => facts[n]);
		const told = names.flatMap(n => facts[n].events.filter(e => e.event !== "save").map(e => [n, e]));
		const row = ([n, e]) => h("tr", h("td", dot(hue(n)), n), h("td.n", e.step ?? "–"), h("td", e.event),
			h("td", e.message || [e.loss != null && `loss ${short(e.loss)}`, e.grad_norm != null && `gradient norm ${short(e.grad_norm)}`, e.back_to != null && `back to step ${e.back_to}`, e.action && `policy: ${e.action}`].filter(Boolean).join(", ")),
			h("td", e.pieces || e.event === "spike" ? h("button.plain", { onclick: guarded(() => documents(n, e.step)) }, "documents") : ""));
		const step = h("input", { type: "number", id: "docstep", min: 1, value: 1 });
		log.replaceChildren(h("details", { open: told.some(([, e]) => e.event === "spike" || e.event === "error") }, h("summary", `Events (${told.length})`),
			sheet(h("thead", h("tr", ["run", "step", "event", "what", ""].map(t => h(t === "step" ? "th.n" : "th", t)))), h("tbody", told.map(row)))),
			names.length ? h("form.bar", { onsubmit: sent(() => documents(names[0], +step.value)) }, field(`documents of a step of ${names[0]}`, step), h("button", "Show")) : "");
		settings.replaceChildren(...names.map(name => {
			const filter = h("input", { type: "search", id: "find-" + name }), rows = h("tbody"), all = facts[name].settings;
			const fill = () => { const t = filter.value.toLowerCase(); rows.replaceChildren(...all.filter(s => t ? s.path.includes(t) : s.changed).map(s => h("tr", h("td.k", s.path), h("td.k", typeof s.value === "string" ? s.value : JSON.stringify(s.value)), h("td.soft", s.origin)))); };
			filter.addEventListener("input", fill); fill();
			return h("details", h("summary", `Config of ${name}`), h("div.bar", field("find among all settings; those that differ from the defaults stand below", filter)),
				sheet(h("thead", h("tr", ["setting", "value", "from"].map(t => h("th", t)))), rows));
		}));
	}
	async function documents(name, step) {
		docs.replaceChildren(h("p.soft", "Reading the batch …"));
		put({ docs: `${name}:${step}` });
		try {
			const rows = await get("batch", { name, step });
			docs.replaceChildren(h("h2", `What step ${step} of ${name} trains on`), h("p.hint", `${rows.length} sequences, ${rows.reduce((s, r) => s + r.tokens, 0).toLocaleString("en")} tokens`),
				...rows.map(r => h("div.docs", h("div.hint", r.documents.map(d => `${d.corpus}: document ${d.document}, tokens ${d.start} to ${d.stop - 1}`).join("; ")), h("pre", { tabindex: 0 }, r.text ?? "(the run names no tokenizer)"))));
			docs.scrollIntoView({ block: "nearest" });
		} catch (e) { docs.replaceChildren(); throw e; }
	}

	table(); await load(); draw(); lists();
	const asked = q.get("docs")?.match(/^(.*):(\d+)$/);
	if (asked && runs.some(r => r.name === asked[1])) guarded(documents)(asked[1], +asked[2]);
	let busy = false, looks = 0;
	const events = () => [...chosen].reduce((n, name) => n + (facts[name]?.events.length || 0), 0);
	const timer = setInterval(async () => {
		if (busy || gone || document.hidden || (!runs.some(alive) && ++looks % CALM)) return;
		busy = true;
		try {
			const was = JSON.stringify(runs.map(r => [r.name, r.step, r.state]));
			runs = await get("runs");
			if (!gone && JSON.stringify(runs.map(r => [r.name, r.step, r.state])) !== was) { const told = events(); await load(); if (!gone) { table(); draw(); if (events() !== told) lists(); } }
			problem(null);
		} catch (e) { if (!gone) problem(e); } finally { busy = false; }
	}, LIVE);
	return () => { gone = true; clearInterval(timer); };
}
