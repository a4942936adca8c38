// Tells the page which file of Save Video File is a video and which a picture that moves.
//
// A node with a VIDEO input is taken for a player of videos, and a player cannot show a GIF or a WebP.

import { app } from "../../../scripts/app.js";
import { findNode } from "./find_node.js";

const NODE = "VideoLDMSaveVideo";
const VIDEO = /\.(mp4|webm)$/i;
const GIF = /\.gif$/i;

function file(output) {
    return output?.images?.[0]?.filename ?? "";
}

function tell(node, output) {
    if (file(output)) {
        node.previewMediaType = VIDEO.test(file(output)) ? "video" : "image";
    }
}

app.registerExtension({
    name: "VideoLDM.SaveVideoFile",

    nodeCreated(node) {
        if (node.comfyClass !== NODE) {
            return;
        }
        const { onExecuted, onDrawBackground } = node;
        node.onExecuted = function (output) {
            tell(this, output);
            return onExecuted?.apply(this, arguments);
        };
        node.onDrawBackground = function () {
            const result = onDrawBackground?.apply(this, arguments);
            // On the canvas a picture stands still unless the node is said to be animated. Said by the server, the page
            // would take a GIF for a video.
            if (GIF.test(file(this))) {
                this.animatedImages = true;
            }
            return result;
        };
    },

    // A workflow that is opened again brings its outputs with it, and runs nothing.
    onNodeOutputsUpdated(outputs) {
        for (const [id, output] of Object.entries(outputs)) {
            const node = findNode(id);
            if (node?.comfyClass === NODE) {
                tell(node, output);
            }
        }
    },
});
