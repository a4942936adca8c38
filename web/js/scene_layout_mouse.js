// What the mouse and the keys do with Scene Layout's boxes, and what lies under the mouse.
//
// Drawing (scene_layout.js) has the node, the text, the elements of the page and the picture.

import { app } from "../../../scripts/app.js";
import { add, between, moved, remove, replace } from "./scene_layout_lines.js";
import { CORNERS, HANDLE, inOrder } from "./scene_layout_picture.js";

const CLICK = 3;                // pixels below which a drag is a click

export class Mouse {
    constructor() {
        this.chosen = null;     // line of the selected box
        this.drag = null;       // what the mouse does: { kind, corner, box, text, from, far, now }
        this.colour = null;     // for new boxes
    }

    listen() {
        const { canvas } = this;
        canvas.addEventListener("pointerdown", (event) => this.press(event));
        canvas.addEventListener("pointermove", (event) => this.move(event));
        canvas.addEventListener("pointerup", (event) => this.release(event));
        canvas.addEventListener("pointercancel", () => this.cancel());
        this.element.addEventListener("keydown", (event) => this.key(event));
        this.element.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    }

    press(event) {
        if (event.button === 1) {
            app.canvas.processMouseDown(event);
        }
        if (event.button !== 0 || this.linked) {
            return;
        }
        event.stopPropagation();
        this.canvas.focus({ preventScroll: true });
        this.canvas.setPointerCapture(event.pointerId);
        const from = this.place(event);
        const hit = this.hit(from);
        this.chosen = hit?.box.line ?? null;
        this.drag = { kind: "draw", ...hit, text: this.text, from, far: false };
        this.draw();
    }

    move(event) {
        if (!this.drag) {
            if (event.buttons === 4) {
                app.canvas.processMouseMove(event);
            }
            this.canvas.style.cursor = this.cursor(this.place(event));
            return;
        }
        event.stopPropagation();
        const { drag } = this, at = this.place(event), { width, height } = this.picture();
        drag.far ||= Math.hypot((at.x - drag.from.x) * width, (at.y - drag.from.y) * height) >= CLICK;
        drag.now = drag.far ? this.dragged(drag, at) : undefined;
        this.draw();
    }

    release(event) {
        if (event.button === 1) {
            app.canvas.processMouseUp(event);
        }
        const { drag } = this;
        this.drag = null;
        if (!drag) {
            return;
        }
        event.stopPropagation();
        if (drag.text !== this.text) {      // someone else wrote in the meantime
            this.draw();
        } else if (drag.now && drag.kind === "draw") {
            this.added(drag.now);
        } else if (drag.now) {
            this.write(replace(this.text, { ...drag.box, ...drag.now }));
        } else {
            this.draw();
        }
    }

    cancel() {
        this.drag = null;
        this.draw();
    }

    key(event) {
        if (event.key === "Delete" || event.key === "Backspace") {
            // Even without a selected box: the page would delete the node.
            event.stopPropagation();
            event.preventDefault();
            this.removed();
        } else if (event.key === "Escape" && this.chosen !== null) {
            event.stopPropagation();
            this.chosen = null;
            this.cancel();
        }
    }

    wheel(event) {
        // Nodes drawn by Vue pass the wheel on by themselves.
        if (!this.inVue) {
            event.preventDefault();
            app.canvas.processMouseWheel(event);
        }
    }

    dragged({ kind, corner, box, from }, at) {
        if (kind === "draw") {
            return this.full() ? undefined : between(from.x, from.y, at.x, at.y);
        }
        if (kind === "move") {
            const { x, y } = moved(box, at.x - from.x, at.y - from.y);
            return { x, y };
        }
        const other = { x: corner.x ? box.x : box.x + box.width, y: corner.y ? box.y : box.y + box.height };
        return between(other.x, other.y, at.x, at.y);
    }

    full() {
        const { boxes, faults } = this.found;
        return boxes.length + faults.length >= (this.limits?.most_boxes ?? Infinity);
    }

    added(box) {
        const text = add(this.text, { ...box, word: this.newColour() });
        this.chosen = text.split("\n").length - 1;
        this.write(text);
    }

    removed() {
        const box = this.selected;
        if (box && !this.linked) {
            this.chosen = null;
            this.write(remove(this.text, box));
        }
    }

    coloured(word) {
        this.colour = word;
        const box = this.selected;
        if (box && !this.linked) {
            this.write(replace(this.text, { ...box, word }));
        } else {
            this.draw();
        }
    }

    newColour() {
        const names = Object.keys(this.limits?.colours ?? {});
        const used = this.found.boxes.map((box) => box.colour);
        if (this.colour && (!names.length || names.includes(this.colour))) {
            return this.colour;
        }
        return names.find((name) => !used.includes(name)) ?? names[0] ?? used[0] ?? "red";
    }

    // Where things are

    /** The picture within the canvas, in its pixels. */
    picture() {
        const { clientWidth: wide, clientHeight: high } = this.canvas;
        const width = Math.min(wide, high / this.shape), height = width * this.shape;
        return { left: (wide - width) / 2, top: (high - height) / 2, width, height };
    }

    /** Where the mouse is, in fractions of the picture. The page may show the node larger or smaller. */
    place(event) {
        const bounds = this.canvas.getBoundingClientRect(), { left, top, width, height } = this.picture();
        const x = ((event.clientX - bounds.left) / bounds.width) * this.canvas.clientWidth;
        const y = ((event.clientY - bounds.top) / bounds.height) * this.canvas.clientHeight;
        return { x: (x - left) / width, y: (y - top) / height };
    }

    /** The box under the mouse, or the corner of the selected one: { kind, box, corner }. */
    hit(at) {
        const { width, height } = this.picture(), box = this.selected;
        for (const corner of box ? CORNERS : []) {
            const [x, y] = [box.x + corner.x * box.width, box.y + corner.y * box.height];
            if (Math.abs(x - at.x) * width <= HANDLE + 2
                && Math.abs(y - at.y) * height <= HANDLE + 2) {
                return { kind: "resize", box, corner };
            }
        }
        const under = inOrder(this.found.boxes).reverse().find((one) => at.x >= one.x && at.x <= one.x + one.width
            && at.y >= one.y && at.y <= one.y + one.height);
        return under && { kind: "move", box: under };
    }

    cursor(at) {
        const hit = this.linked ? null : this.hit(at);
        if (hit?.kind === "resize") {
            return hit.corner.x === hit.corner.y ? "nwse-resize" : "nesw-resize";
        }
        return hit ? "move" : this.linked || this.full() ? "default" : "crosshair";
    }
}
