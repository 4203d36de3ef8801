// Max-min fair shares with sliders: the same rules as sqla_fairpool/scheduling/policy.py.
(() => {
  const root = document.getElementById("shares-of-tags");
  if (!root) return;
  const tags = [["acme", 20], ["umbrella", 20], ["reports", 0], ["backup", 0]];
  const state = { capacity: 20 };

  function shares(wants) {
    const active = wants.filter((want) => want > 0).length;
    const part = active > 1 ? 1 / 2 : 3 / 4;
    const limit = Math.ceil(state.capacity * part);
    const got = wants.map(() => 0);
    for (let left = state.capacity; left > 0; left--) {
      let next = -1;
      wants.forEach((want, i) => {
        const open = got[i] < Math.min(want, limit);
        if (open && (next < 0 || got[i] < got[next])) next = i;
      });
      if (next < 0) break;
      got[next]++;
    }
    return { got, limit, active };
  }

  const grid = "display:grid;width:100%;grid-template-columns:6em minmax(0,1fr) 11em;gap:.4em;align-items:center";
  root.innerHTML = tags.map(([name, want], i) =>
    `<label style="${grid}"><span>${name}</span>` +
    `<input style="width:100%" type="range" min="0" max="40" value="${want}" data-i="${i}">` +
    `<output></output></label>` +
    `<div style="height:.8em;margin-bottom:.6em;border:1px solid currentColor">` +
    `<div class="bar" style="height:100%;background:#2980b9"></div></div>`
  ).join("") + "<p></p>";
  const inputs = [...root.querySelectorAll("input")];

  function draw() {
    const wants = inputs.map((input) => Number(input.value));
    const { got, limit, active } = shares(wants);
    root.querySelectorAll("output").forEach((output, i) => {
      output.textContent = `wants ${wants[i]}, gets ${got[i]}`;
    });
    root.querySelectorAll(".bar").forEach((bar, i) => {
      bar.style.width = `${(100 * got[i]) / state.capacity}%`;
    });
    const used = got.reduce((sum, one) => sum + one, 0);
    root.querySelector("p").textContent =
      `${active} active, limit ${limit} each, ${used} of ${state.capacity} in use`;
  }
  root.addEventListener("input", draw);
  draw();
})();
