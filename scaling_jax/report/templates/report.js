// Draws a ring around the marked point nearest to the pointer, and shows its text.
"use strict";
const tip = document.getElementById("tip");
for (const figure of document.querySelectorAll("figure")) {
  const svg = figure.querySelector("svg");
  const marks = JSON.parse(figure.querySelector("script").textContent);
  const ring = document.createElementNS("http://www.w3.org/2000/svg", "circle");
  ring.setAttribute("class", "ring");
  ring.setAttribute("r", 6);
  const hide = () => { tip.hidden = true; ring.remove(); };
  const show = (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    let nearest = null, least = 20;
    for (const mark of marks) {
      const distance = Math.hypot(mark[0] - at.x, mark[1] - at.y);
      if (distance < least) { least = distance; nearest = mark; }
    }
    if (nearest === null) { hide(); return; }
    ring.setAttribute("cx", nearest[0]);
    ring.setAttribute("cy", nearest[1]);
    svg.append(ring);
    tip.textContent = nearest[2];
    tip.hidden = false;
    const box = tip.getBoundingClientRect(), gap = 14;
    const right = event.clientX + gap + box.width < innerWidth;
    tip.style.left = Math.max(4, right ? event.clientX + gap : event.clientX - gap - box.width) + "px";
    tip.style.top = Math.max(4, event.clientY - gap - box.height) + "px";
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", hide);
}
addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
addEventListener("beforeprint", () => { for (const d of document.querySelectorAll("details")) d.open = true; });
