// Plots on canvas: linear and logarithmic axes, marks of events, a cross-hair with values.
const PALETTE = ["#2463b0", "#b54f14", "#1c7a46", "#8246af", "#b3264f", "#0f7f8c", "#7a6a00", "#5b6470"];
const DARK = ["#7fb2ee", "#f0a06a", "#6cc894", "#c39be6", "#f08fa9", "#66c7d1", "#d6c35a", "#a9b2bc"];
const dark = matchMedia("(prefers-color-scheme: dark)");
export const color = i => (dark.matches ? DARK : PALETTE)[i % PALETTE.length];
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

export function short(v) {
	if (v == null || !isFinite(v)) return "–";
	const a = Math.abs(v);
	if (a >= 1e9) return +(v / 1e9).toPrecision(3) + "G";
	if (a >= 1e6) return +(v / 1e6).toPrecision(3) + "M";
	if (a >= 1e4) return +(v / 1e3).toPrecision(3) + "k";
	if (a && a < 1e-3) return v.toExponential(1);
	return String(+v.toPrecision(a >= 1e3 ? 5 : 4));
}

function ticks(lo, hi, most, log) {
	if (log) {
		const out = [], from = Math.floor(Math.log10(lo) + 1e-9), to = Math.ceil(Math.log10(hi) - 1e-9);
		const every = Math.max(1, Math.ceil((to - from) / most));
		const inner = to - from <= 1 ? [1, 2, 3, 4, 5, 6, 7, 8, 9] : to - from <= 3 ? [1, 2, 5] : [1];
		for (let e = from; e <= to; e += every) for (const m of inner) {
			const v = m * 10 ** e;
			if (v >= lo * .999 && v <= hi * 1.001) out.push(v);
		}
		if (out.length >= 2) return out;
	}
	const rough = (hi - lo) / most || 1, power = 10 ** Math.floor(Math.log10(rough));
	const step = [1, 2, 5, 10].map(f => f * power).find(s => s >= rough * .999);
	const out = [];
	for (let v = Math.ceil(lo / step - 1e-9) * step; v <= hi + step * 1e-9; v += step) out.push(+v.toPrecision(12));
	return out;
}

export function smooth(y, window) {
	if (window < 2) return y;
	const sums = [0], counts = [0];
	for (const v of y) { sums.push(sums.at(-1) + (v ?? 0)); counts.push(counts.at(-1) + (v == null ? 0 : 1)); }
	return y.map((v, i) => {
		const r = Math.min(i, y.length - 1 - i, window >> 1), n = counts[i + r + 1] - counts[i - r];
		return v == null || !n ? null : (sums[i + r + 1] - sums[i - r]) / n;
	});
}

// series: {name, color, x, y, faint, points}; marks: {x, kind, color, label, open, quiet}
export class Plot {
	constructor(canvas, tip) {
		this.canvas = canvas; this.tip = tip; this.data = null;
		new ResizeObserver(() => this.draw()).observe(canvas);
		dark.addEventListener("change", () => this.draw());
		canvas.addEventListener("pointermove", e => this.hover(e));
		canvas.addEventListener("pointerleave", () => { this.at = null; this.tip.hide(); this.draw(); });
		canvas.addEventListener("click", e => { const m = this.mark(e); if (m?.open) m.open(); });
	}
	set(data) { this.data = data; this.draw(); }
	ready(lo, hi, log) { return lo <= hi && (!log || lo > 0); }
	draw() {
		const { canvas, data } = this, w = canvas.clientWidth, h = canvas.clientHeight;
		if (!w || !data) return;
		const ratio = devicePixelRatio || 1;
		if (canvas.width !== Math.round(w * ratio) || canvas.height !== Math.round(h * ratio)) {
			canvas.width = Math.round(w * ratio); canvas.height = Math.round(h * ratio);
		}
		const g = canvas.getContext("2d");
		g.setTransform(ratio, 0, 0, ratio, 0, 0); g.clearRect(0, 0, w, h);
		g.font = "12px system-ui, 'DejaVu Sans', sans-serif"; g.lineJoin = "round";
		const line = (x0, y0, x1, y1) => { g.beginPath(); g.moveTo(x0, y0); g.lineTo(x1, y1); g.stroke(); };
		const { logX, logY } = data, good = (v, log) => v != null && isFinite(v) && (!log || v > 0);
		let x0 = Infinity, x1 = -Infinity, y0 = Infinity, y1 = -Infinity;
		for (const s of data.series) for (let i = 0; i < s.x.length; i++) {
			const a = s.x[i], b = s.y[i];
			if (!good(a, logX) || !good(b, logY)) continue;
			if (a < x0) x0 = a; if (a > x1) x1 = a;
			if (!s.faint || data.series.length < 2) { if (b < y0) y0 = b; if (b > y1) y1 = b; }
		}
		if (x0 > x1 || y0 > y1) {
			g.fillStyle = css("--soft"); g.textAlign = "center"; g.fillText(data.empty || "nothing recorded yet", w / 2, h / 2); this.map = null; return;
		}
		if (y0 === y1) { const d = Math.abs(y0) * .1 || 1; y1 += d; if (!logY || y0 > d) y0 -= d; }
		if (x0 === x1) { x1 = logX ? x1 * 1.1 : x1 + 1; }
		const f = (v, log) => log ? Math.log(v) : v, pad = .04 * (f(y1, logY) - f(y0, logY));
		const Y0 = f(y0, logY) - pad, Y1 = f(y1, logY) + pad, X0 = f(x0, logX), X1 = f(x1, logX);
		const yt = ticks(logY ? Math.exp(Y0) : Y0, logY ? Math.exp(Y1) : Y1, Math.max(2, h / 42), logY);
		const left = 10 + Math.max(...yt.map(v => g.measureText(short(v)).width)), right = 12, top = data.marks?.length ? 18 : 8, bottom = data.xLabel ? 38 : 22;
		const px = v => left + (f(v, logX) - X0) / (X1 - X0) * (w - left - right);
		const py = v => h - bottom - (f(v, logY) - Y0) / (Y1 - Y0) * (h - top - bottom);
		this.map = { px, left, right, top, bottom, w, h, back: p => { const v = X0 + (p - left) / (w - left - right) * (X1 - X0); return logX ? Math.exp(v) : v; } };
		g.strokeStyle = css("--line"); g.fillStyle = css("--soft"); g.lineWidth = 1; g.textBaseline = "middle"; g.textAlign = "right";
		for (const v of yt) {
			const y = Math.round(py(v)) + .5; g.globalAlpha = .6; line(left, y, w - right, y);
			g.globalAlpha = 1; g.fillText(short(v), left - 6, y);
		}
		g.textBaseline = "top"; let last = -99;
		for (const v of ticks(x0, x1, Math.max(2, w / 90), logX)) {
			const x = px(v), t = short(v), half = g.measureText(t).width / 2;
			line(Math.round(x) + .5, h - bottom, Math.round(x) + .5, h - bottom + 4);
			if (x - half > last + 6) { g.textAlign = x + half > w ? "right" : "center"; g.fillText(t, x + half > w ? w : x, h - bottom + 6); last = x + half; }
		}
		line(left, h - bottom + .5, w - right, h - bottom + .5);
		if (data.xLabel) { g.textAlign = "center"; g.fillText(data.xLabel, (left + w - right) / 2, h - 14); }
		g.save(); g.beginPath(); g.rect(left, top - 2, w - left - right + 2, h - top - bottom + 4); g.clip();
		for (const m of data.marks || []) if (good(m.x, logX)) {
			const x = Math.round(px(m.x)) + .5;
			g.strokeStyle = m.color; g.globalAlpha = m.quiet ? .3 : .75; g.setLineDash(m.kind === "start" ? [4, 3] : []);
			line(x, m.quiet ? h - bottom - 7 : top, x, h - bottom);
		}
		g.setLineDash([]);
		for (const s of data.series) {
			g.strokeStyle = g.fillStyle = s.color; g.globalAlpha = s.faint ? .28 : 1; g.lineWidth = s.faint ? 1 : 1.7;
			if (s.points) { // few values: dots on a thin line
				g.lineWidth = 1; g.setLineDash([3, 3]); g.beginPath();
				s.x.forEach((a, i) => { if (good(a, logX) && good(s.y[i], logY)) g.lineTo(px(a), py(s.y[i])); });
				g.stroke(); g.setLineDash([]);
				s.x.forEach((a, i) => { if (good(a, logX) && good(s.y[i], logY)) { g.beginPath(); g.arc(px(a), py(s.y[i]), 3, 0, 7); g.fill(); } });
				continue;
			}
			g.beginPath(); // of all values on one column of pixels the first, lowest, highest and last are enough
			let col = null, open = false;
			const flush = () => { if (!col) return; open ? g.lineTo(col.x, col.a) : g.moveTo(col.x, col.a); open = true; if (col.n > 1) { g.lineTo(col.x, col.lo); g.lineTo(col.x, col.hi); g.lineTo(col.x, col.b); } col = null; };
			for (let i = 0; i < s.x.length; i++) {
				if (!good(s.x[i], logX) || !good(s.y[i], logY)) { flush(); open = false; continue; }
				const x = px(s.x[i]), y = py(s.y[i]);
				if (col && Math.floor(x) === Math.floor(col.x)) { col.lo = Math.min(col.lo, y); col.hi = Math.max(col.hi, y); col.b = y; col.n++; } else { flush(); col = { x, a: y, b: y, lo: y, hi: y, n: 1 }; }
			}
			flush(); g.stroke();
		}
		g.restore(); g.globalAlpha = 1;
		for (const m of data.marks || []) if (!m.quiet && good(m.x, logX)) {
			const x = px(m.x); g.fillStyle = m.color; g.beginPath(); g.moveTo(x - 5, 3); g.lineTo(x + 5, 3); g.lineTo(x, 12); g.fill();
		}
		if (this.at != null) {
			g.strokeStyle = css("--soft"); g.globalAlpha = .6; line(this.at, top, this.at, h - bottom); g.globalAlpha = 1;
		}
	}
	mark(e) {
		if (!this.map) return null;
		const near = (this.data.marks || []).filter(m => m.label).map(m => [Math.abs(this.map.px(m.x) - e.offsetX), m]).sort((a, b) => a[0] - b[0])[0];
		return near && near[0] < 7 ? near[1] : null;
	}
	hover(e) {
		if (!this.map) return;
		const m = this.map, p = Math.min(Math.max(e.offsetX, m.left), m.w - m.right), value = m.back(p);
		const rows = [], mark = this.mark(e);
		let place = null;
		for (const s of this.data.series) {
			if (s.faint || !s.x.length) continue;
			let lo = 0, hi = s.x.length - 1;
			while (lo < hi) { const mid = (lo + hi) >> 1; if (s.x[mid] < value) lo = mid + 1; else hi = mid; }
			const i = lo && value - s.x[lo - 1] < s.x[lo] - value ? lo - 1 : lo;
			if (s.y[i] == null) continue;
			if (place == null || Math.abs(s.x[i] - value) < Math.abs(place - value)) place = s.x[i];
			rows.push([s.color, s.name, short(s.y[i])]);
		}
		this.at = place == null ? p : m.px(place); this.canvas.style.cursor = mark?.open ? "pointer" : "";
		this.draw();
		this.tip.rows(e, `${this.data.xLabel || "step"} ${short(place ?? value)}`, rows, mark?.label);
	}
}
