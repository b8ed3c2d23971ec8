// The page: four views, each with an address of its own (#view?key=value), on top of /api and /v1.
import { Plot, color, short, smooth } from "./plot.js";
import { runsView } from "./runs.js";
import { tryView } from "./try.js";
import { compareView } from "./compare.js";
import { insideView } from "./inside.js";

// An element: h("p.soft", { id: "x" }, children ...), with its attributes left out where it has none.
export function h(kind, attrs, ...children) {
	const [tag, ...classes] = kind.split("."), e = document.createElement(tag);
	if (attrs == null || attrs === false || typeof attrs !== "object" || attrs instanceof Node || Array.isArray(attrs)) { children.unshift(attrs); attrs = {}; }
	if (attrs.onclick && tag === "button") e.type = tag; // which sends no form
	if (classes.length) e.className = classes.join(" ");
	for (const [k, v] of Object.entries(attrs)) {
		if (k.startsWith("on")) e.addEventListener(k.slice(2), v);
		else if (k === "style") e.style.cssText = v;
		else if (["value", "checked", "selected", "disabled", "hidden"].includes(k)) e[k] = v;
		else if (v != null && v !== false) e.setAttribute(k, v === true ? "" : v);
	}
	e.append(...children.flat(9).filter(c => c != null && c !== false));
	return e;
}
export const dot = c => h("span.dot", { style: `background:${c}` });
export const sheet = (...rows) => h("div.scroll", h("table", rows));
export const $ = id => document.getElementById(id);

let key = sessionStorage.getItem("key") || "";
export async function api(path, body, signal) {
	const headers = key ? { Authorization: `Bearer ${key}` } : {};
	if (body) headers["Content-Type"] = "application/json";
	let answer;
	try { answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal }); }
	catch (e) { if (e.name === "AbortError") throw e; throw new Error("The server does not answer. Is `castalia serve` still running?"); }
	if (answer.ok) return answer;
	const said = await answer.json().catch(() => null);
	const error = new Error(said?.error?.message || `the server answered ${answer.status}`);
	error.status = answer.status;
	throw error;
}
export const get = async (path, params, signal) => (await api(`/api/${path}` + (params ? "?" + new URLSearchParams(params) : ""), null, signal)).json();
export const post = async (path, body, signal) => (await api(path, body, signal)).json();

export function problem(error) {
	if (error?.name === "AbortError") return;
	const box = $("problem");
	box.hidden = !error;
	if (!error) return;
	box.replaceChildren(error.message || String(error));
	if (error.status === 401) {
		const input = h("input", { type: "password", id: "key", autocomplete: "current-password" });
		box.replaceChildren(h("form.bar", { onsubmit: e => { e.preventDefault(); key = input.value; sessionStorage.setItem("key", key); problem(null); show(); } },
			h("div.field", h("label", { for: "key" }, "This server asks for its key (--api-key)"), input), h("button.main", "Use it")));
	}
	if (error instanceof TypeError) console.error(error);
}
// An event's handler whose failure is shown in words.
export const guarded = f => async (...args) => { try { problem(null); await f(...args); } catch (e) { problem(e); } };

export const sent = f => guarded(e => { e.preventDefault(); return f(); }); // of a form

export const tip = {
	box: $("tip"), pinned: false,
	place(x, y) {
		const b = this.box; b.hidden = false;
		const w = b.offsetWidth, wide = document.documentElement.clientWidth;
		b.style.left = Math.max(6, Math.min(x, wide - w - 10)) + scrollX + "px";
		b.style.top = (y + b.offsetHeight > innerHeight && y > b.offsetHeight + 40 ? y - b.offsetHeight - 34 : y) + scrollY + "px";
	},
	rows(e, title, rows, note) {
		if (this.pinned) return;
		this.box.replaceChildren(h("div.soft", title), h("table", rows.map(([c, n, v]) => h("tr", h("td", dot(c), n), h("td.n", v)))), note ? h("div", note) : null);
		this.place(e.clientX + 14, e.clientY + 16);
	},
	show(anchor, content, pinned = false) {
		if (this.pinned && !pinned) return;
		this.pinned = pinned; this.anchor = anchor;
		this.box.replaceChildren(content);
		const r = anchor.getBoundingClientRect();
		this.place(r.left, r.bottom + 4);
	},
	hide(force) { if (this.pinned && !force) return; this.pinned = false; this.box.hidden = true; },
};
addEventListener("keydown", e => { if (e.key === "Escape" && !tip.box.hidden) { if (tip.pinned) tip.anchor.focus(); tip.hide(true); } });
addEventListener("pointerdown", e => { if (tip.pinned && !tip.box.contains(e.target) && e.target !== tip.anchor) tip.hide(true); });

// The address: #view?key=value. `put` changes it without drawing the view anew.
export const state = () => { const [view, query] = location.hash.slice(1).split("?"); return { view: view || "runs", q: new URLSearchParams(query || "") }; };
export function put(changes) {
	const { view, q } = state();
	for (const [k, v] of Object.entries(changes)) v == null || v === "" || v === false ? q.delete(k) : q.set(k, v);
	const text = q.toString();
	history.replaceState(null, "", `#${view}${text ? "?" + text : ""}`);
}
export const models = () => get("models");
export const bySource = list => list.reduce((m, e) => { (m[e.source] ||= []).push(e); return m; }, {});
export function modelSelect(id, list, chosen, onchange) {
	const groups = Object.entries(bySource(list)).map(([source, entries]) => entries.length > 1 || entries[0].step != null
		? h("optgroup", { label: source }, entries.map(e => option(e.name, e.name, chosen)).reverse())
		: option(entries[0].name, entries[0].name, chosen));
	return h("select", { id, onchange: e => onchange(e.target.value) }, groups);
}
export const newest = list => list.at(-1)?.name;
export const nameOf = (list, name) => list.some(e => e.name === name) ? name : list.filter(e => name && (e.source === name || e.source + "@latest" === name)).at(-1)?.name;
export const field = (label, input) => h("div.field", h("label", { for: input.id }, label), input);
const option = (value, text, chosen) => h("option", { value, selected: value === chosen }, text);
export const choice = (id, label, pairs, chosen, take) => field(label, h("select", { id, onchange: e => take(e.target.value) }, pairs.map(([v, t]) => option(v, t, chosen))));
export const number = (id, label, value, attrs) => field(label, h("input", { type: "number", id, value, ...attrs }));

// Tokens: how sure the model was is the strength of the colour behind them.
export const visible = t => t.replace(/\n/g, "↵").replace(/ /g, "·").replace(/\t/g, "⇥") || "∅";
export const surprise = p => `background: rgba(222, 120, 20, ${Math.min(1, Math.max(0, -Math.log(Math.max(p, 1e-9)) / 7)) * .62})`;
export const difference = d => `background: ${d < 0 ? "rgba(28, 140, 80," : "rgba(196, 50, 40,"} ${Math.min(1, Math.abs(d) / 3) * .6})`;
export const percent = p => p >= .0995 ? (100 * p).toFixed(0) + " %" : p >= .001 ? (100 * p).toFixed(1) + " %" : p.toExponential(0);
// Arrow keys move among the tokens of a text, of which one is in the order of tabs.
export function tokens(box) {
	box.addEventListener("keydown", e => {
		const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 }[e.key];
		if (!step || !e.target.classList.contains("tok")) return;
		const all = [...box.querySelectorAll(".tok")], at = all.indexOf(e.target), to = all[Math.max(0, Math.min(all.length - 1, at + step))];
		e.preventDefault(); e.target.tabIndex = -1; to.tabIndex = 0; to.focus();
	});
	return box;
}
export async function each(source, take, signal) { // server-sent events of /v1
	const reader = source.body.pipeThrough(new TextDecoderStream()).getReader();
	let text = "";
	for (;;) {
		const { done, value } = await reader.read();
		if (done) return;
		text += value;
		for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
			const data = text.slice(0, end).replace(/^data: ?/gm, "");
			if (data === "[DONE]") return;
			const piece = JSON.parse(data);
			if (piece.error) throw new Error(piece.error.message);
			take(piece);
		}
	}
}

// Shows a note while the pointer or the focus is on an element.
export const noted = f => ({ onpointerenter: e => tip.show(e.currentTarget, f()), onfocus: e => tip.show(e.currentTarget, f()), onpointerleave: () => tip.hide(), onblur: () => tip.hide() });
export const noModel = (main, title) => main.replaceChildren(h("h1", title), h("p", "No checkpoint lies below the folders that are served."));

const VIEWS = { runs: runsView, try: tryView, compare: compareView, inside: insideView };
let leave = null;
async function show() {
	let { view, q } = state();
	if (!VIEWS[view]) view = "runs";
	leave?.(); leave = null; tip.hide(true); problem(null);
	for (const a of document.querySelectorAll("nav a")) a.dataset.view === view ? a.setAttribute("aria-current", "page") : a.removeAttribute("aria-current");
	const main = $("main");
	main.replaceChildren(h("p.soft", "Loading …"));
	document.title = `Castalia: ${document.querySelector("nav [aria-current]").textContent}`;
	try { leave = await VIEWS[view](main, q); } catch (e) { main.replaceChildren(); problem(e); }
	main.dataset.ready = view;
}
addEventListener("hashchange", () => { delete $("main").dataset.ready; show(); });
show();
export { Plot, color, short, smooth };
