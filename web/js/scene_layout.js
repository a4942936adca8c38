// Scene Layout's boxes, drawn with the mouse.
//
// The drawing is a widget below the others. It stores nothing: it shows the text of the boxes and writes into it. A
// page that has no such widgets shows the text, as before.

import { app } from "../../../scripts/app.js";
import { read, say } from "./scene_layout_lines.js";
import { Mouse } from "./scene_layout_mouse.js";
import { drawBox, drawGround, inOrder } from "./scene_layout_picture.js";

const NODE = "VideoLDMSceneLayout";
const FOLLOW = 150;             // milliseconds after which an edit of the text is seen
const DRAWING = "video-ldm-drawing";    // class of the drawing's element
const BELOW = 58;               // height of the colours and the words
const MARGIN = 20;              // around a widget, by the page
const MORE_LINES = 30;          // height that a new node's text gets beyond the least
const LOWEST = 90, HIGHEST = 420;       // height of the picture

let layoutFiles = {};           // { file: limits }, from the node's definition

class Drawing extends Mouse {
    constructor(node) {
        super();
        this.node = node;
        this.shown = "";        // what the last picture was drawn from
        this.build();
    }

    build() {
        this.element = make("div", { display: "flex", flexDirection: "column", gap: "4px", width: "100%" });
        this.element.className = DRAWING;
        this.canvas = make("canvas", { flex: "1 1 auto", width: "100%", minHeight: "0", maxHeight: `${HIGHEST}px`,
                                       outline: "none", touchAction: "none", borderRadius: "4px" });
        this.canvas.tabIndex = 0;           // takes the keys
        this.bar = make("div", { display: "flex", gap: "4px", flex: "0 0 auto", height: "20px" });
        this.words = make("div", { flex: "0 0 auto", height: "30px", overflow: "hidden", font: "12px/15px sans-serif",
                                   color: "var(--input-text, #ddd)" });
        this.element.append(this.canvas, this.bar, this.words);
        this.listen();
    }

    // What the widgets say

    widget(name) {
        return this.node.widgets?.find((one) => one.name === name);
    }

    get text() {
        return String(this.widget("boxes")?.value ?? "");
    }

    get limits() {
        return layoutFiles[this.widget("file")?.value];
    }

    get linked() {
        return Boolean(this.node.inputs?.some((one) => one.widget?.name === "boxes" && one.link != null));
    }

    get shape() {
        const [width, height] = ["width", "height"].map((name) => Number(this.widget(name)?.value) || 1);
        return height / width;
    }

    get height() {
        const picture = (this.node.size[0] - MARGIN) * this.shape;
        return Math.min(Math.max(picture, LOWEST), HIGHEST) + BELOW + MARGIN;
    }

    get found() {
        return read(this.text, this.limits);
    }

    get selected() {
        return this.found.boxes.find((box) => box.line === this.chosen);
    }

    write(text) {
        const widget = this.widget("boxes");
        widget.value = text;
        widget.callback?.(text);
        app.graph.setDirtyCanvas(true, true);
        this.draw();
        // One edit is one step of undo.
        const tracker = app.extensionManager?.workflow?.activeWorkflow?.changeTracker;
        (tracker?.captureCanvasState ?? tracker?.checkState)?.call(tracker);
    }

    /** Draw again if something has changed: the artist types, chooses another file, or takes a step back. */
    follow() {
        const { canvas } = this;
        this.takePlace();
        const now = JSON.stringify([this.text, this.limits, this.linked, this.shape, this.widget("light")?.value,
                                    this.chosen, this.drag?.now, canvas.clientWidth, canvas.clientHeight]);
        if (now !== this.shown) {
            this.shown = now;
            this.draw();
            this.makeRoom();
        }
    }

    /** Grow the node if the picture's shape asks for it. Nodes drawn by Vue grow by themselves. */
    makeRoom() {
        const { node } = this, least = node.computeSize()[1];
        if (!this.inVue && node.size[1] < least) {
            node.setSize([node.size[0], least]);
        }
        app.graph.setDirtyCanvas(true, true);
    }

    get inVue() {
        return Boolean(this.element.closest("[data-node-id]"));
    }

    /** Undo makes the node anew, and nodes drawn by Vue go on showing the drawing of the node that is gone. */
    takePlace() {
        const { element, node } = this;
        if (!element.isConnected && node.graph && node.graph === app.canvas.graph) {
            document.querySelector(`[data-node-id="${node.id}"] .${DRAWING}`)?.replaceWith(element);
        }
    }

    // Only a node in a graph is followed: a copy on its way to the clipboard is made like a node, and never removed.
    start() {
        this.stop();
        this.timer = setInterval(() => this.follow(), FOLLOW);
    }

    stop() {
        clearInterval(this.timer);
    }

    // The picture

    draw() {
        const { canvas, found, limits } = this, sharp = 2 * (window.devicePixelRatio || 1);
        canvas.style.aspectRatio = String(1 / this.shape);
        [canvas.width, canvas.height] = [canvas.clientWidth * sharp, canvas.clientHeight * sharp];
        const pen = canvas.getContext("2d"), { left, top, width, height } = this.picture();
        pen.setTransform(sharp, 0, 0, sharp, left * sharp, top * sharp);
        drawGround(pen, this.widget("light")?.value, width, height);
        for (const box of this.linked ? [] : inOrder(this.boxesNow(found))) {
            drawBox(pen, box, box.line === this.chosen || box.line === -1, width, height, limits);
        }
        this.drawBar();
        const full = this.drag?.kind === "draw" && this.drag.far && this.full();
        this.words.textContent = this.linked ? "The boxes come through the link."
            : full ? `${say(found, limits)} Remove one to draw another.` : say(found, limits);
        this.words.title = this.words.textContent;
    }

    /** The boxes, with the one that is being dragged where it is now. */
    boxesNow(found) {
        const { drag } = this;
        if (!drag?.now) {
            return found.boxes;
        }
        if (drag.kind === "draw") {
            const word = this.newColour();
            return [...found.boxes, { ...drag.now, word, colour: word, line: -1 }];
        }
        return found.boxes.map((box) => (box.line === drag.box.line ? { ...box, ...drag.now } : box));
    }

    /** One button for each colour of the file, and one that removes the selected box. */
    drawBar() {
        const box = this.selected, now = box?.colour ?? (this.full() ? null : this.newColour());
        const colours = Object.entries(this.limits?.colours ?? {});
        const state = JSON.stringify([colours, now, Boolean(box), this.linked]);
        if (this.bar.dataset.state === state) {
            return;
        }
        this.bar.dataset.state = state;
        this.bar.style.visibility = this.linked ? "hidden" : "visible";
        this.bar.replaceChildren(...colours.map(([name, paint]) => this.button(
            box ? `Make the box ${name}` : `Draw in ${name}`, () => this.coloured(name), "",
            { background: paint, border: name === now ? "2px solid var(--input-text, #fff)" : "1px solid #0008" })),
            this.button("Remove the box (Delete)", () => this.removed(), "×", {
                marginLeft: "auto", background: "none", border: "none", color: "var(--input-text, #ddd)",
                font: "bold 18px/18px sans-serif", opacity: box ? "1" : "0.3" }));
    }

    button(title, action, text, style) {
        const button = make("button", { width: "22px", height: "20px", padding: "0", borderRadius: "4px",
                                        cursor: "pointer", ...style });
        Object.assign(button, { type: "button", title, textContent: text });
        button.setAttribute("aria-label", title);
        button.addEventListener("pointerdown", (event) => event.stopPropagation());
        button.addEventListener("click", () => {
            action();
            this.canvas.focus({ preventScroll: true });     // or Delete would go to the page, which deletes the node
        });
        return button;
    }
}

function make(tag, style) {
    const element = document.createElement(tag);
    Object.assign(element.style, style);
    return element;
}

app.registerExtension({
    name: "VideoLDM.SceneLayout",

    // Called when the page opens, and again when the lists are refreshed (R).
    beforeRegisterNodeDef(type, definition) {
        if (definition.name === NODE) {
            layoutFiles = definition.input?.required?.boxes?.[1]?.layout_files ?? {};
        }
    },

    nodeCreated(node) {
        if (node.comfyClass !== NODE || !node.addDOMWidget || !node.widgets?.some((one) => one.name === "boxes")) {
            return;
        }
        const drawing = new Drawing(node);
        const widget = node.addDOMWidget("drawing", "video_ldm_drawing", drawing.element, {
            serialize: false,           // not in the prompt
            hideOnZoom: false,
            getMinHeight: () => drawing.height,
            getMaxHeight: () => drawing.height,
            getValue: () => "",
            setValue: () => {},
        });
        widget.serialize = false;       // not in the workflow
        node.setSize([node.size[0], node.computeSize()[1] + MORE_LINES]);
        const { onAdded, onRemoved } = node;
        node.onAdded = function () {
            drawing.start();
            return onAdded?.apply(this, arguments);
        };
        node.onRemoved = function () {
            drawing.stop();
            return onRemoved?.apply(this, arguments);
        };
    },
});
