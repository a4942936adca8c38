// The picture of Scene Layout: a road by day or night, and boxes on it.

import { paintOf } from "./scene_layout_lines.js";

export const HANDLE = 5;        // side of a corner's handle, in pixels
const GROUNDS = {               // sky, meadow, road, marks
    day: ["#9fc0dc", "#7f9470", "#808480", "#d8d8d0"],
    night: ["#10121e", "#1a221c", "#20222c", "#6a6a66"],
    any: ["#686b6e", "#5a5e5a", "#505356", "#8a8a86"],
};
// A straight road of the demo's world: height of the horizon, and by how much of the width half a lane widens below it.
const HORIZON = 0.42, HALF_LANE = 0.395;
const FAR_MARKS = 0.08;         // where the marks begin, between the horizon and the lower edge
export const CORNERS = [{ x: 0, y: 0 }, { x: 1, y: 0 }, { x: 0, y: 1 }, { x: 1, y: 1 }];

/** Boxes from back to front: nearer cars stand lower. */
export function inOrder(boxes) {
    return [...boxes].sort((one, other) => one.y + one.height - other.y - other.height);
}

/** The road by light ("day", "night" or "any"), in pixels. */
export function drawGround(pen, light, width, height) {
    const [sky, meadow, road, marks] = GROUNDS[light] ?? GROUNDS.any;
    const horizon = HORIZON * height;
    // How far from the middle a line that runs along the road at so many half lanes is at the lower edge.
    const spread = (halves) => halves * HALF_LANE * (1 - HORIZON) * width;
    pen.save();
    pen.beginPath();
    pen.rect(0, 0, width, height);
    pen.clip();
    fill(pen, sky, 0, 0, width, horizon);
    fill(pen, meadow, 0, horizon, width, height - horizon);
    pen.fillStyle = road;
    pen.beginPath();
    pen.moveTo(width / 2, horizon);
    pen.lineTo(width / 2 - spread(3), height);
    pen.lineTo(width / 2 + spread(3), height);
    pen.fill();
    pen.strokeStyle = marks;
    pen.setLineDash([height / 20, height / 20]);
    for (const side of [-1, 1]) {
        pen.beginPath();
        pen.moveTo(width / 2 + spread(side) * FAR_MARKS, horizon + FAR_MARKS * (height - horizon));
        pen.lineTo(width / 2 + spread(side), height);
        pen.stroke();
    }
    pen.restore();
}

/** One box in its colour, with handles if it is chosen. */
export function drawBox(pen, box, chosen, width, height, limits) {
    const [x, y, w, h] = [box.x * width, box.y * height, box.width * width, box.height * height];
    fill(pen, paintOf(box, limits), x, y, w, h);
    pen.lineWidth = chosen ? 2 : 1;
    pen.strokeStyle = chosen ? "#ffffff" : "rgba(0, 0, 0, 0.6)";
    pen.strokeRect(x, y, w, h);
    for (const corner of chosen ? CORNERS : []) {
        const [left, top] = [x + corner.x * w - HANDLE / 2, y + corner.y * h - HANDLE / 2];
        fill(pen, "#ffffff", left - 1, top - 1, HANDLE + 2, HANDLE + 2);
        fill(pen, "#000000", left, top, HANDLE, HANDLE);
    }
}

function fill(pen, paint, x, y, width, height) {
    pen.fillStyle = paint;
    pen.fillRect(x, y, width, height);
}
