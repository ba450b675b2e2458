// Draws a page's charts and its browser of samples. Where scripts are off, the still figures and tables remain.
(() => {
  "use strict";
  const value = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const escape = (text) => text.replace(/[&<>]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[c]);

  const dark = matchMedia("(prefers-color-scheme: dark)");
  // An empty colour is the text's. On dark paper, dark colours are mixed with white.
  const paint = (colour) => !colour ? value("--ink")
    : dark.matches && echarts.color.lum(colour, 0) < 0.4 ? echarts.color.lift(colour, 0.4) : colour;
  const range = (numbers) => {
    const low = Math.min(...numbers), high = Math.max(...numbers), room = (high - low) * 0.05 || 1;
    return [low - room, high + room];
  };

  // The series of ECharts for one of ours in diagram number `index`: its points, and their error bars.
  function drawnSeries(one, index) {
    const on = { name: one.label, xAxisIndex: index, yAxisIndex: index }, colour = paint(one.colour);
    const drawn = [{
      ...on, type: one.line ? "line" : "scatter", symbol: one.symbol, symbolSize: one.size, showAllSymbol: true,
      itemStyle: { color: colour, opacity: one.opacity },
      lineStyle: { color: colour, type: one.line, width: 1.5, opacity: one.opacity },
      data: one.points.map((point) => ({ value: point.at, facts: point.facts, model: point.model })),
      emphasis: { focus: "series" }, z: 3,
    }];
    // All bars are one line with gaps, under the same name, so that the legend hides them too.
    const bars = one.points.flatMap(({ at: [x, y], error: [dx, dy] }) => [
      ...(dx ? [[x - dx, y], [x + dx, y], ["-", "-"]] : []), ...(dy ? [[x, y - dy], [x, y + dy], ["-", "-"]] : [])]);
    if (bars.length) drawn.push({
      ...on, type: "line", data: bars, symbol: "none", silent: true, z: 2,
      itemStyle: { color: colour }, lineStyle: { color: colour, width: 1.2, opacity: 0.7 },
    });
    return drawn;
  }

  // `view` is a part of the plane: [lowest, highest] of both axes, or null for all of it.
  function options(chart, width, view) {
    const ink = value("--ink"), grid = value("--line"), count = chart.panels.length, same = chart.same_axes;
    const fit = same ? Math.min(4, Math.floor(width / 165)) : Math.floor(width / 270);
    const columns = Math.max(1, Math.min(count === 4 ? 2 : count, fit)), wide = width / columns;
    const high = count > 1 ? (same ? wide - 20 : 210) : 380, left = same ? 8 : 66, below = same ? 44 : 92;
    const every = chart.panels.map((panel) => [...chart.shared, ...panel.series]);
    const labels = [...new Set(every.flat().map((one) => one.label))];
    // the legend's own height is not known before it is drawn
    const lines = Math.ceil(labels.reduce((sum, label) => sum + 7 * label.length + 48, 0) / width);
    const top = 22 * lines + (count > 1 ? 34 : 16);
    const points = every.flat().flatMap((one) => one.points);
    const [x, y] = view ? [view.x, view.y] : same ? [0, 1].map((i) => range(points.map((point) => point.at[i]))) : [];
    const axis = (name, index, limits, nameGap, type) => ({
      name, gridIndex: index, min: limits && limits[0], max: limits && limits[1], nameGap, nameLocation: "middle",
      type, scale: true, splitNumber: count > 1 ? 4 : 6, nameTextStyle: { color: ink, fontSize: 13 },
      axisLabel: { color: ink, show: !same, hideOverlap: true, showMinLabel: !limits, showMaxLabel: !limits }, axisTick: { show: !same },
      axisLine: { onZero: false, lineStyle: { color: ink } }, splitLine: { lineStyle: { color: grid } },
    });
    // Diagrams on the same axes zoom together, others each for itself.
    const zooms = same ? [chart.panels.map((_, i) => i)] : chart.panels.map((_, i) => i);
    const place = (i) => ({ left: left + (i % columns) * wide, top: top + Math.floor(i / columns) * (high + below) });
    return {
      height: top + Math.ceil(count / columns) * (high + below) - 20,
      animation: false, series: every.flatMap((series, i) => series.flatMap((one) => drawnSeries(one, i))),
      title: chart.panels.map((panel, i) => ({
        text: panel.title, left: place(i).left, top: place(i).top - 26, padding: 2,
        textStyle: { color: ink, fontSize: 13, width: wide - 20, overflow: "truncate" },
      })),
      grid: chart.panels.map((_, i) => ({ ...place(i), width: wide - left - 20, height: high })),
      xAxis: chart.panels.map((panel, i) => axis(panel.x_title, i, x, 30, panel.x_log ? "log" : "value")),
      yAxis: chart.panels.map((panel, i) => axis(panel.y_title, i, y || panel.y, 44, "value")),
      legend: { type: "plain", top: 0, textStyle: { color: ink }, data: labels },
      dataZoom: zooms.flatMap((i) => [{ xAxisIndex: i }, { yAxisIndex: i }]).map((one) => ({ type: "inside", filterMode: "none", ...one })),
      toolbox: { right: 0, bottom: 0, feature: { restore: { title: "whole view" }, saveAsImage: { type: "svg", title: "save" } },
                 iconStyle: { borderColor: ink } },
      tooltip: {
        trigger: "item", confine: true, backgroundColor: value("--paper"), borderColor: value("--rule"),
        textStyle: { color: ink, fontSize: 13 }, extraCssText: "max-width: 26rem; white-space: pre-line; overflow-wrap: anywhere",
        formatter: ({ data }) => (data.facts || []).map(escape).join("\n")
          + (data.model && browser ? "\n<i>click for its samples</i>" : ""),
      },
    };
  }

  const browser = document.querySelector(".browser");
  for (const figure of document.querySelectorAll("figure[data-chart]")) {
    const place = document.createElement("div"), chart = read(figure.dataset.chart);
    place.className = "chart";
    figure.querySelector("img").replaceWith(place);
    const drawn = echarts.init(place, null, { renderer: "svg" });
    let view = null;
    const draw = () => {
      if (!place.clientWidth) return; // hidden
      const { height, ...rest } = options(chart, place.clientWidth, view);
      place.style.height = `${height}px`;
      drawn.resize();
      drawn.setOption(rest, true);
    };
    draw();
    for (const one of chart.views.length ? [{ label: "whole" }, ...chart.views] : []) {
      const button = document.createElement("button");
      button.textContent = one.label;
      button.onclick = () => { view = one.x ? one : null; draw(); };
      place.before(button);
    }
    drawn.on("click", ({ data }) => data.model && browser && browse(data.model));
    addEventListener("resize", draw);
    dark.addEventListener("change", draw);
  }

  let browse = () => {};
  if (browser) {
    const rows = read(browser.dataset.rows);
    const [model, prompt, search, colour] = [".model", ".prompt", "[type=search]", "[type=checkbox]"].map((one) => browser.querySelector(one));
    const list = browser.querySelector("ol"), count = browser.querySelector(".count");
    for (const [name, label] of new Map(rows.map((row) => [row.name, row.label]))) model.add(new Option(label, name));
    model.add(new Option("all models", ""));
    const prompts = [...new Set(rows.map((row) => row.prompt))];
    prompt.add(new Option("all prompts", ""));
    for (const one of prompts) if (one) prompt.add(new Option(one.length > 60 ? one.slice(0, 60) + "…" : one, one));
    prompt.parentElement.hidden = prompts.length < 2;
    const piece = (text, log_prob) => {
      const span = document.createElement("span");
      span.textContent = text;
      if (log_prob !== null && log_prob !== undefined) {
        span.title = `log p* ${log_prob.toFixed(2)}`;
        // one hue, stronger where p* finds the token less likely; 10 nats and more are full
        if (colour.checked) span.style.background = `rgba(213, 94, 0, ${Math.min(1, -log_prob / 10) * 0.75})`;
      }
      return span;
    };
    const show = () => {
      const wanted = search.value.toLowerCase();
      const found = rows.filter((row) => (!model.value || row.name === model.value) && (!prompt.value || row.prompt === prompt.value)
        && row.pieces.join("").toLowerCase().includes(wanted));
      count.textContent = `${found.length} of ${rows.length} samples`;
      list.replaceChildren(...found.map((row) => {
        const item = document.createElement("li"), note = document.createElement("small");
        note.textContent = `${row.label}, sample ${row.index}${row.cut ? ", " + row.cut : ""}${row.total === null ? "" : ", log p* of a token " + row.total.toFixed(2)}`;
        item.append(note, document.createElement("br"), ...row.pieces.map((text, i) => piece(text, row.log_p_star[i])));
        return item;
      }));
    };
    for (const control of [model, prompt, search, colour]) control.addEventListener("input", show);
    browse = (name) => {
      if (![...model.options].some((one) => one.value === name)) return;
      model.value = name;
      show();
      browser.scrollIntoView({ behavior: "smooth" });
    };
    show();
    browser.hidden = false;
    browser.nextElementSibling.hidden = true;
  }
})();
