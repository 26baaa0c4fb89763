"use strict";
// Each plane holds its pictures as data; a slider puts those of one slice into the images that are there.
for (const plane of document.querySelectorAll(".plane")) {
  const slider = plane.querySelector("input[type=range]");
  const output = plane.querySelector("output");
  let pictures = null;
  const show = () => {
    pictures ??= JSON.parse(plane.querySelector("script").textContent);
    const place = Number(slider.value);
    for (const image of plane.querySelectorAll("img[data-layer]")) {
      image.src = pictures.layers[image.dataset.layer][place];
    }
    const text = `voxel ${pictures.indices[place]}, ${place + 1} of ${pictures.indices.length}`;
    output.textContent = text;
    slider.setAttribute("aria-valuetext", text);
  };
  slider.addEventListener("input", show);
  if (slider.value !== slider.getAttribute("value")) show(); // a reload keeps the slider's place
  plane.querySelector(".slider").hidden = false;
}
