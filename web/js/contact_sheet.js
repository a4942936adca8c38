// A button of Save Video File that shows the contact sheet in the place of the video, and the video again.
//
// The page keeps no room free for a second picture, so the two take turns. The button comes with the first sheet.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { findNode } from "./find_node.js";
import { inVue, keyOf, outputStore } from "./page_store.js";

const NODE = "VideoLDMSaveVideo";
const BUTTON = "Contact sheet / video";      // some pages show a button's name, not its label

const PLAYER = "video-preview";             // the page's own widget that plays a video
const VIDEO = "video_ldm_video";            // in an output that shows the sheet: what it shows of the video

const outputs = new WeakMap();      // the output of a node's last run, by node
const videos = new WeakMap();       // what a player showed before the sheet, by its element
const showsSheet = new WeakSet();   // nodes that show the sheet now

function addButton(node) {
    node.addWidget("button", BUTTON, null, () => turn(node), { serialize: false }).serialize = false;
    const [width, height] = node.size;
    node.setSize([width, Math.max(height, node.computeSize()[1])]);
}

function address(file) {
    return api.apiURL(`/view?${new URLSearchParams(file)}`);
}

// On the canvas the page keeps a player for good. So the sheet is put into it.
function turnPlayer(element, sheet, file) {
    if (!sheet) {
        element.replaceChildren(...(videos.get(element) ?? []));
        return;
    }
    const picture = new Image();
    picture.src = address(file);
    Object.assign(picture.style, { width: "100%", height: "100%", objectFit: "contain" });
    videos.set(element, [...element.children]);
    element.replaceChildren(picture);
}

// Only this node is told, and no listener of "executed": nothing has run.
function tell(node, output) {
    const key = keyOf(node), store = outputStore()?.nodeOutputs;
    if (store) {
        store[key] = output;        // first: the store may be the object below, and sees no change behind its back
    }
    app.nodeOutputs[key] = output;
    node.onExecuted?.(output);
    node.setDirtyCanvas(true, true);
}

function turn(node) {
    const output = outputs.get(node), sheet = !showsSheet.has(node);
    if (!output) {
        return;
    }
    const player = inVue() ? null : node.widgets.find((widget) => widget.name === PLAYER);
    if (inVue() && !outputStore()?.nodeOutputs) {        // then the sheet is shown in a tab
        window.open(address(output.contact_sheet[0]));
        return;
    }
    showsSheet[sheet ? "add" : "delete"](node);
    if (player) {
        turnPlayer(player.element, sheet, output.contact_sheet[0]);
        return;
    }
    const { images, animated } = output;
    tell(node, sheet ? { ...output, images: output.contact_sheet, animated: [false], [VIDEO]: { images, animated } }
        : output);
}

/** Take an output from a run, or from a workflow that is opened again, which may show the sheet already. */
function take(node, { [VIDEO]: video, ...output }) {
    showsSheet[video ? "add" : "delete"](node);
    if (!output.contact_sheet?.length) {
        outputs.delete(node);
        return;
    }
    outputs.set(node, { ...output, ...video });
    if (!node.widgets.some((widget) => widget.name === BUTTON)) {
        addButton(node);
    }
}

app.registerExtension({
    name: "VideoLDM.ContactSheet",

    setup() {
        api.addEventListener("executed", ({ detail }) => {
            const node = findNode(detail.display_node ?? detail.node);
            if (node?.comfyClass === NODE) {
                take(node, detail.output ?? {});
            }
        });
    },

    // A workflow that is opened again brings its outputs with it, and runs nothing.
    onNodeOutputsUpdated(restored) {
        for (const [id, output] of Object.entries(restored)) {
            const node = findNode(id);
            if (node?.comfyClass === NODE) {
                take(node, output ?? {});
            }
        }
    },
});
