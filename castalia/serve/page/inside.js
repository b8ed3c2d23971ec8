// Look inside: the logit lens of a text; what a checkpoint holds, how it differs from another, what its config needs.
import { h, get, post, put, guarded, sent, models, noModel, noted, modelSelect, newest, nameOf, field, sheet, choice, tokens, percent, visible, short } from "./page.js";

const heat = s => `background: rgba(36, 99, 176, ${Math.min(1, Math.max(0, s)) * .55})`;
const say = v => v == null ? "–" : typeof v === "number" ? (Number.isInteger(v) ? v.toLocaleString("en") : short(v)) : Array.isArray(v) ? v.map(say).join(", ") : typeof v === "object" ? Object.entries(v).filter(([, x]) => x != null).map(([k, x]) => `${k.replaceAll("_", " ")} ${say(x)}`).join(", ") : String(v);
const facts = (o, names) => sheet(h("tbody", (names || Object.keys(o)).filter(k => o[k] != null && (typeof o[k] !== "object" || Object.keys(o[k]).length)).map(k => h("tr", h("th", { scope: "row" }, k.replaceAll("_", " ")), h("td", say(o[k]))))));
const table = (heads, rows) => sheet(h("thead", h("tr", heads.map((t, i) => h("th", { class: i ? "n" : "" }, t)))), h("tbody", rows.map(r => h("tr", r.map((c, i) => h("td", { class: i ? "n" : "" }, typeof c === "number" ? say(c) : c))))));

export async function insideView(main, q) {
	const list = await models();
	if (!list.length) return noModel(main, "Look inside");
	let model = nameOf(list, q.get("model")) || newest(list), other = nameOf(list, q.get("with")) || list[0].name, measure = q.get("show") || "prob", found = null;
	const input = h("input", { type: "text", id: "text", value: q.get("text") ?? "", size: 60, autocomplete: "off", spellcheck: "false" });
	const lens = h("div", { id: "lens" }), about = h("div"), against = h("div"), needs = h("div");
	const part = (title, name, content, load) => h("details", { open: q.get("open") === name, ontoggle: guarded(async e => { if (e.target.open) { put({ open: name }); await load(); } }) }, h("summary", title), content);
	const sections = [
		part("inspect: what it holds", "inspect", about, inspect),
		part("diff: how it differs from another", "diff", h("div", h("div.bar", field("beside", modelSelect("with", list, other, guarded(m => { other = m; put({ with: m }); return diff(); })))), against), diff),
		part("plan: what training it needs", "plan", needs, plan)];
	main.replaceChildren(h("h1", "Look inside"),
		h("div.bar", field("checkpoint", modelSelect("model", list, model, guarded(m => { model = m; put({ model }); if (input.value) look(); return Promise.all(sections.map((s, i) => s.open && [inspect, diff, plan][i]())); })))),
		h("h2", "Logit lens"), h("p.hint", "Below each token, what each layer would predict to follow it if the final norm and the head came next. The top row is the model itself."),
		h("form.bar", { onsubmit: sent(look) }, field("text", input),
			choice("show", "colour", [["prob", "probability of the guess"], ["next", "probability of the token that follows"], ["entropy", "entropy"]], measure, v => { measure = v; put({ show: v === "prob" ? null : v }); draw(); }),
			h("button.main", "Look")), lens, ...sections);

	async function look() {
		if (!input.value) { lens.replaceChildren(h("p.soft", "Write a text first.")); return; }
		put({ model, text: input.value });
		lens.style.opacity = .55;
		try { found = await post("/api/lens", { model, text: input.value }); draw(); } finally { lens.style.opacity = 1; }
	}
	function draw() {
		if (!found) return;
		const most = Math.max(...found.rows.flatMap(r => r.entropy));
		const cell = (row, i) => {
			const top = row.top[i], p = top[0].prob, next = row.next_prob[i], e = row.entropy[i];
			const shade = measure === "prob" ? p : measure === "next" ? next ?? 0 : 1 - e / most;
			const told = () => h("div", h("div.soft", `layer ${row.layer} after ${visible(found.texts[i])}`), h("table", top.map(g => h("tr", h("td", visible(g.text)), h("td.n", percent(g.prob))))), h("div.soft", `entropy ${e.toFixed(2)} nats`, next == null ? "" : `; ${visible(found.texts[i + 1])} follows: ${percent(next)}`));
			return h("td.tok", { tabindex: -1, style: heat(shade), ...noted(told) }, visible(top[0].text).slice(0, 12));
		};
		const t = tokens(h("table.lens", h("thead", h("tr", h("th", "layer"), found.texts.map(x => h("th", { scope: "col" }, visible(x).slice(0, 12))))),
			h("tbody", [...found.rows].reverse().map(r => h("tr", h("th", { scope: "row" }, r.layer), found.ids.map((_, i) => cell(r, i)))))));
		t.querySelector(".tok").tabIndex = 0;
		lens.replaceChildren(h("div.scroll", t));
	}
	async function inspect() {
		about.replaceChildren(h("p.soft", "Reading …"));
		const r = await get("inspect", { model });
		about.replaceChildren(h("p", r.meaning), ...["disagreements", "anomalies", "notes"].flatMap(k => r[k].map(t => h("p", { class: k === "notes" ? "soft" : "failed" }, t))),
			facts({ ...r, progress: { step: r.progress.step, tokens: r.progress.tokens, skipped: r.progress.skipped } }, ["format", "progress", "parameters", "bytes", "precision", "vocabulary"]),
			h("h2", "Architecture"), sheet(h("tbody", Object.entries(r.architecture).filter(([, f]) => f.value != null).map(([k, f]) => h("tr", h("th", { scope: "row" }, k.replaceAll("_", " ")), h("td", say(f.value)), h("td.soft", f.source))))),
			h("h2", "Values of a sample"), table(["kind", "tensors", "mean", "standard deviation", "lowest", "highest"], r.statistics.map(s => [s.kind, s.tensors, s.mean, s.std, s.low, s.high])));
	}
	async function diff() {
		against.replaceChildren(h("p.soft", "Comparing …"));
		const d = await get("diff", { a: other, b: model }), most = Math.max(...Object.values(d.updates), 1e-12);
		against.replaceChildren(h("p", d.words), facts({ tensors: d.counts, structure: d.structure, optimizer: d.optimizer }),
			h("h2", "Relative change of each layer"), sheet(h("tbody", Object.entries(d.updates).map(([k, v]) => h("tr", h("td.k", k), h("td.n", v.toFixed(4)), h("td", { style: "width:60%" }, h("span.meter", { style: `width:${100 * v / most}%` })))))),
			h("h2", "Standard deviations"), table(["kind", "tensors", "of " + other, "of " + model, "ratio"], d.parts.map(p => [p.part, p.tensors, p.std_a, p.std_b, p.ratio])));
	}
	async function plan() {
		needs.replaceChildren(h("p.soft", "Working it out …"));
		const p = await get("plan", { model }), stage = p.memory?.stages?.[0];
		needs.replaceChildren(...[...p.warnings, ...p.assumed].map(t => h("p.soft", t)), facts(p.training),
			stage ? h("h2", "Memory of the largest rank") : "", stage ? table(["part", "MB"], Object.entries(stage).filter(([k, v]) => v && !["stage", "layers", "ranks"].includes(k)).map(([k, v]) => [k.replaceAll("_", " "), +(v / 1e6).toPrecision(4)])) : "",
			...p.unknown.map(t => h("p.hint", "not known: " + t)));
	}
	if (input.value) await look();
}
