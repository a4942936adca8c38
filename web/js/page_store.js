// What the page keeps of a node's outputs and previews.

import { app } from "../../../scripts/app.js";

/** The store that Vue draws from. It has no public door: undefined on a page that keeps it elsewhere. */
export function outputStore() {
    return app.extensionManager?._p?.state?.value?.nodeOutput;
}

/** The key of a node's outputs: its id, and in a subgraph the subgraph's own name before it. */
export function keyOf({ id, graph }) {
    return graph?.isRootGraph === false ? `${graph.id}:${id}` : String(id);
}

export function inVue() {
    return Boolean(window.LiteGraph?.vueNodesMode);
}
