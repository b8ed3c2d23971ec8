// Try: a prompt, or a conversation, continued token by token; every token tells how likely it was, and what else was.
import { h, api, post, put, guarded, sent, problem, tip, models, noModel, noted, modelSelect, newest, nameOf, field, number, tokens, each, surprise, percent, visible } from "./page.js";

const TOP = 10;

export async function tryView(main, q) {
	const list = await models();
	if (!list.length) return noModel(main, "Try");
	let model = nameOf(list, q.get("model")) || newest(list), template = false, limit = Infinity, turns = [], stop = null, line = [], prompt = null, said = "", given = "";
	const input = h("textarea", { id: "prompt", rows: 3, value: q.get("prompt") ?? "", spellcheck: "false" });
	const out = tokens(h("div.text", { id: "out", role: "group", "aria-label": "What the model writes" })), talk = h("div"), note = h("p.hint", { "aria-live": "polite" });
	const go = h("button.main", "Write"), halt = h("button", { hidden: true, onclick: () => stop?.abort() }, "Stop");
	const chat = h("input", { type: "checkbox", id: "chat", checked: q.has("chat"), onchange: () => { turns = []; clear(); arrange(); } });
	const chatLabel = h("label.check", { for: "chat", hidden: true }, chat, "as a conversation");
	const value = id => main.querySelector("#" + id).value;
	const isChat = () => template && chat.checked;

	main.replaceChildren(h("h1", "Try"),
		h("form", { novalidate: true, onsubmit: sent(write) },
			h("div.bar", field("checkpoint", modelSelect("model", list, model, guarded(m => { model = m; put({ model }); return look(); }))),
				number("temperature", "temperature (0: the likeliest)", q.get("temperature") ?? 0.8, { min: 0, max: 5, step: 0.1 }), number("max", "tokens at most", q.get("max") ?? 80, { min: 1 }), number("seed", "seed", q.get("seed") ?? "", { placeholder: "any" }), chatLabel),
			talk, field("prompt", input), h("div.bar", go, halt, h("span.hint", "likely", h("span.scale", { style: "background:linear-gradient(90deg, rgba(222,120,20,0), rgba(222,120,20,.62))" }), "surprising. Point at a token for what else was likely; choose one to write on from there."))),
		out, note);
	input.addEventListener("keydown", e => { if (e.key === "Enter" && (e.ctrlKey || e.metaKey)) e.target.form.requestSubmit(); });

	async function look() {
		try { const info = await (await api("/tokenizer_info?" + new URLSearchParams({ model }))).json(); template = !!info.chat_template; limit = main.querySelector("#max").max = info.max_model_len; }
		catch (e) { template = false; throw e; } finally { chatLabel.hidden = !template; arrange(); }
	}
	function arrange() {
		main.querySelector("label[for=prompt]").textContent = isChat() ? "your turn" : "prompt";
		input.placeholder = isChat() ? "Say something" : "A text to continue";
		talk.hidden = !isChat();
	}
	function clear() { line = []; said = ""; prompt = null; out.replaceChildren(); note.textContent = ""; talk.replaceChildren(...turns.map(t => h("div.turn", h("b", t.role), t.content))); }

	async function write() {
		tip.hide(true);
		if (isChat()) {
			if (line.length) turns.push({ role: "assistant", content: said });
			turns.push({ role: "user", content: input.value }); input.value = "";
		} else if (!input.value) { note.textContent = "Write a prompt first."; input.focus(); return; }
		put({ model, prompt: isChat() ? null : input.value, temperature: value("temperature"), max: value("max"), seed: value("seed"), chat: isChat() && 1 });
		given = isChat() ? "" : input.value;
		clear();
		await run(isChat() ? { messages: turns, top_logprobs: TOP, logprobs: true } : { prompt: input.value, logprobs: TOP });
	}
	// Write on from the token of this place, with another one in its stead.
	const branch = guarded(async (place, id) => {
		tip.hide(true); stop?.abort();
		const { top } = line[place], chosen = top.find(t => t.id === id);
		line = line.slice(0, place); out.replaceChildren(lead(), ...line.map(token));
		add({ ...chosen, top });
		said = line.map(t => t.text).join("");
		const left = Math.max(1, +value("max") - line.length);
		await run({ prompt: [...prompt, ...line.map(t => t.id)], logprobs: TOP, max_tokens: left });
	});
	const lead = () => h("span.given", given);

	async function run(body) {
		const mine = stop = new AbortController(), began = performance.now(), decoder = new TextDecoder();
		go.disabled = true; halt.hidden = false;
		if (!line.length) out.replaceChildren(lead());
		const first = line.length, wanted = body.max_tokens || +value("max"); let reason = null, room = 0;
		try {
			// The last token is never read.
			room = limit + 1 - (Array.isArray(body.prompt) ? body.prompt.length : (await post("/tokenize", { model, messages: body.messages, prompt: body.prompt }, mine.signal)).count);
			const path = body.messages ? "/v1/chat/completions" : "/v1/completions", seed = value("seed");
			const answer = await api(path, { model, temperature: +value("temperature"), ...(seed === "" ? {} : { seed: +seed }), stream: true, return_token_ids: true, ...body, max_tokens: Math.max(1, Math.min(wanted, room)) }, mine.signal);
			await each(answer, piece => {
				const c = piece.choices[0];
				if (!c) return;
				if (c.prompt_token_ids && !prompt) prompt = c.prompt_token_ids;
				said += c.delta?.content ?? c.text ?? "";
				reason = c.finish_reason || reason;
				for (const t of entries(c.logprobs)) add({ ...t, text: decoder.decode(new Uint8Array(t.bytes), { stream: true }) });
			});
		} catch (e) { if (e.name !== "AbortError") throw e; reason = "stopped"; }
		finally {
			if (stop === mine) { go.disabled = false; halt.hidden = true; }
			const n = line.length - first, s = (performance.now() - began) / 1000, mean = line.reduce((sum, t) => sum + t.logprob, 0) / (line.length || 1);
			if (n > 0) note.textContent = `${n} tokens in ${s.toFixed(1)} s, ${(n / s).toFixed(1)} a second; mean log-probability ${mean.toFixed(2)}${{ length: n < wanted ? "; as many as the model has room for" : "; as many as were allowed", stop: "; the model ended the text", stopped: "; stopped" }[reason] || ""}`;
		}
	}
	function entries(l) { // both forms of log-probabilities
		if (!l) return [];
		if (l.content) return l.content.map(t => ({ id: t.token_id, logprob: t.logprob, bytes: t.bytes, top: t.top_logprobs.map(a => ({ id: a.token_id, text: a.token, logprob: a.logprob })) }));
		return l.tokens.map((_, i) => ({ id: l.token_ids[i], logprob: l.token_logprobs[i], bytes: l.bytes[i], top: Object.entries(l.top_logprobs[i] || {}).map(([text, logprob]) => ({ text, logprob, id: l.top_token_ids[i][text] })) }));
	}
	function add(t) { line.push(t); out.append(token(t, line.length - 1)); }
	function token(t, place) {
		const p = Math.exp(t.logprob);
		return h("button.tok", { "data-id": t.id, style: surprise(p), tabindex: place ? -1 : 0, "aria-label": `${visible(t.text)}, ${percent(p)}`, ...noted(() => others(t, place)),
			onclick: e => { tip.show(e.currentTarget, others(t, place), true); tip.box.querySelector("button")?.focus(); } }, t.text);
	}
	function others(t, place) {
		const most = Math.max(...t.top.map(a => a.logprob), t.logprob), rows = [...t.top].sort((a, b) => b.logprob - a.logprob);
		return h("div", h("div.soft", `${visible(t.text)} had ${percent(Math.exp(t.logprob))}`),
			h("table", rows.map(a => h("tr", h("td", h("button", { "aria-label": `write on with ${visible(a.text)}`, onclick: () => branch(place, a.id) }, (a.id === t.id ? "▸ " : "  ") + visible(a.text))),
				h("td.n", percent(Math.exp(a.logprob))), h("td.bar-cell", h("span.meter", { style: `width:${100 * Math.exp(a.logprob - most)}%` }))))));
	}
	arrange();
	await look().catch(problem);
	if (q.get("prompt") && !isChat()) guarded(write)();
	return () => stop?.abort();
}
