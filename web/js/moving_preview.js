// Plays the preview of a clip in the node that samples it.
//
// The preview that arrives is a sheet of pictures. Just before it the server says where they are in it
// (nodes/host/moving_preview.py). A page that lacks what is needed here shows the sheet, and so does the node afterwards.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { findNode } from "./find_node.js";
import { cut, movingPicture, paint, sizeOf } from "./moving_preview_picture.js";
import { inVue, keyOf, outputStore } from "./page_store.js";

const EVENT = "video_ldm.preview";
const SETTING = "VideoLDM.MovingPreview";
const ENDS = ["executing", "execution_success", "execution_error", "execution_interrupted"];

const told = new Map();             // how the next sheet is cut, by the id of the node that samples
const players = new Map();          // what plays now, by node
const followed = new WeakSet();     // nodes whose drawing a player follows

// On the canvas the page draws `node.imgs`. A canvas of our own takes the place of the sheet there.
class CanvasPlayer {
    constructor(node) {
        this.node = node;
        this.canvas = document.createElement("canvas");
        if (!followed.has(node)) {
            followed.add(node);
            const { onDrawBackground } = node;
            node.onDrawBackground = function () {
                const result = onDrawBackground?.apply(this, arguments);
                players.get(this)?.draw?.();
                return result;
            };
        }
    }

    async take(how, blob) {
        const sheet = await createImageBitmap(blob), cells = cut(how, sheet.width, sheet.height);
        const [width, height] = sizeOf(cells);
        Object.assign(this, { sheet, cells });
        Object.assign(this.canvas, { width, height, naturalWidth: width, naturalHeight: height });      // as pictures do
        clearInterval(this.timer);
        if (!this.stopped) {
            this.timer = setInterval(() => this.node.setDirtyCanvas(true, true), 1000 / cells.fps);
        }
    }

    // The page loads the sheet by itself, a little later than it arrives.
    draw() {
        const { imgs } = this.node;
        if (!imgs?.length || !this.sheet) {
            return;
        }
        if (imgs[0] !== this.canvas) {
            this.shown = imgs;
            this.canvas.src = imgs[0].src;
            this.node.imgs = [this.canvas];
        }
        paint(this.canvas, this.sheet, this.cells, performance.now());
    }

    stop() {
        this.stopped = true;
        clearInterval(this.timer);
        if (this.node.imgs?.[0] === this.canvas) {
            this.node.imgs = this.shown;
        }
        this.node.setDirtyCanvas(true, true);
    }
}

// Vue shows the last of a node's previews. A picture that moves by itself is put behind the sheet.
class VuePlayer {
    constructor(node) {
        this.key = keyOf(node);
    }

    get previews() {
        return outputStore()?.nodePreviewImages?.[this.key];
    }

    // Up to its turn the last picture stays, so that nothing flickers.
    async take(how, blob) {
        const sheet = this.previews?.[0];
        this.show(sheet, this.address);
        const { width, height } = await createImageBitmap(blob);
        const picture = await movingPicture(blob, cut(how, width, height), performance.now());
        if (!this.stopped && this.previews?.[0] === sheet) {
            const last = this.address;
            this.address = URL.createObjectURL(picture);
            this.show(sheet, this.address);
            forget(last);
        }
    }

    show(sheet, moving) {
        if (sheet) {
            outputStore().nodePreviewImages[this.key] = moving ? [sheet, moving] : [sheet];
        }
    }

    stop() {
        this.stopped = true;
        if (this.address && this.previews?.includes(this.address)) {
            this.show(this.previews[0]);
        }
        forget(this.address);
    }
}

function forget(address) {
    if (address) {
        setTimeout(() => URL.revokeObjectURL(address), 1000);       // the page may be about to draw it
    }
}

// The page shows the preview of a node in a subgraph in the node of the subgraph too.
function nodesOf(id) {
    const parts = String(id).split(":");
    return parts.map((_, number) => findNode(parts.slice(0, number + 1).join(":"))).filter(Boolean);
}

function stop(node) {
    players.get(node)?.stop();
    players.delete(node);
}

function take({ blob, nodeId, displayNodeId }) {
    const how = told.get(String(nodeId)), Player = inVue() ? VuePlayer : CanvasPlayer;
    told.delete(String(nodeId));
    for (const node of nodesOf(displayNodeId ?? nodeId)) {
        if (!how || !(players.get(node) instanceof Player)) {
            stop(node);
        }
        if (how && app.extensionManager?.setting?.get?.(SETTING) !== false) {
            const player = players.get(node) ?? new Player(node);
            players.set(node, player);
            player.take(how, blob).catch(() => stop(node));         // then the sheet is seen
        }
    }
}

app.registerExtension({
    name: "VideoLDM.MovingPreview",
    settings: [{ id: SETTING, name: "Video LDM: moving preview", type: "boolean", defaultValue: true,
                 tooltip: "Plays the preview of a clip while it is sampled. Off: its frames side by side." }],

    setup() {
        api.addEventListener(EVENT, ({ detail }) => told.set(String(detail.node), detail));
        api.addEventListener("b_preview_with_metadata", ({ detail }) => take(detail));
        for (const end of ENDS) {
            api.addEventListener(end, () => [...players.keys()].forEach(stop));
        }
    },
});
