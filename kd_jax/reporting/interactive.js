// Draws a page's charts and its browser of samples. Where scripts are off, the still figures and tables remain.
(() => {
  "use strict";
  const value = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const escape = (text) => text.replace(/[&<>]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[c]);

  // `view` is a part of the plane: [lowest, highest] of both axes, or null for all of it.
  function options(chart, width, view) {
    const ink = value("--ink"), line = value("--line");
    const axis = (name, range) => ({
      name, min: range && range[0], max: range && range[1], nameLocation: "middle", type: "value", scale: true, nameGap: 34, splitNumber: 6,
      nameTextStyle: { color: ink, fontSize: 13 }, axisLabel: { color: ink }, axisLine: { onZero: false, lineStyle: { color: ink } },
      splitLine: { lineStyle: { color: line } },
    });
    const series = [];
    // the legend's own height is not known before it is drawn
    const lines = Math.ceil(chart.series.reduce((sum, one) => sum + 7 * one.label.length + 48, 0) / width);
    for (const one of chart.series) {
      series.push({
        name: one.label, type: "line", symbol: one.symbol, symbolSize: one.size, showAllSymbol: true,
        itemStyle: { color: one.colour }, lineStyle: { color: one.colour, type: one.line || "solid", width: one.line ? 1.5 : 0 },
        data: one.points.map((point) => ({ value: point.at, facts: point.facts, model: point.model })),
        emphasis: { focus: "series" }, z: 3,
      });
      // An error bar is a line of its own, under the same name, so that the legend hides it too.
      for (const { at: [x, y], error: [dx, dy] } of one.points)
        for (const [on, ends] of [[dx, [[x - dx, y], [x + dx, y]]], [dy, [[x, y - dy], [x, y + dy]]]])
          if (on) series.push({
            name: one.label, type: "line", data: ends, symbol: "none", silent: true, z: 2,
            itemStyle: { color: one.colour }, lineStyle: { color: one.colour, width: 1.2, opacity: 0.7 },
          });
    }
    return {
      animation: false, series, xAxis: axis(chart.x_title, view && view.x),
      yAxis: { ...axis(chart.y_title, view && view.y), nameGap: 44 },
      legend: { type: "plain", top: 0, textStyle: { color: ink }, data: chart.series.map((one) => one.label) },
      grid: { left: 66, right: 20, bottom: 56, top: 16 + 22 * lines },
      dataZoom: [{ type: "inside", xAxisIndex: 0 }, { type: "inside", yAxisIndex: 0 }],
      toolbox: { right: 0, bottom: 0, feature: { restore: { title: "whole view" }, saveAsImage: { type: "svg", title: "save" } },
                 iconStyle: { borderColor: ink } },
      tooltip: {
        trigger: "item", confine: true, backgroundColor: value("--paper"), borderColor: value("--rule"),
        textStyle: { color: ink, fontSize: 13 },
        formatter: ({ data }) => (data.facts || []).map(escape).join("<br>")
          + (data.model && browser ? "<br><i>click for its samples</i>" : ""),
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
    const draw = () => drawn.setOption(options(chart, place.clientWidth, view), true);
    draw();
    for (const one of chart.views.length ? [{ label: "whole" }, ...chart.views] : []) {
      const button = document.createElement("button");
      button.textContent = one.label;
      button.onclick = () => { view = one.x ? one : null; draw(); };
      place.before(button);
    }
    drawn.on("click", ({ data }) => data.model && browser && browse(data.model));
    addEventListener("resize", () => { drawn.resize(); draw(); });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  }

  let browse = () => {};
  if (browser) {
    const rows = read(browser.dataset.rows);
    const [model, search, colour] = ["select", "[type=search]", "[type=checkbox]"].map((one) => browser.querySelector(one));
    const list = browser.querySelector("ol"), count = browser.querySelector(".count");
    for (const [name, label] of new Map(rows.map((row) => [row.name, row.label]))) model.add(new Option(label, name));
    model.add(new Option("all models", ""));
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
      const found = rows.filter((row) => (!model.value || row.name === model.value)
        && row.pieces.join("").toLowerCase().includes(wanted));
      count.textContent = `${found.length} of ${rows.length} samples`;
      list.replaceChildren(...found.map((row) => {
        const item = document.createElement("li"), note = document.createElement("small");
        note.textContent = `${row.label}, sample ${row.index}${row.cut ? ", " + row.cut : ""}${row.total === null ? "" : ", log p* of a token " + row.total.toFixed(2)}`;
        item.append(note, document.createElement("br"), ...row.pieces.map((text, i) => piece(text, row.log_p_star[i])));
        return item;
      }));
    };
    for (const control of [model, search, colour]) control.addEventListener("input", show);
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
