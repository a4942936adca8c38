// Finds a node by the id that the server or the page names it by.

import { app } from "../../../scripts/app.js";

// "3:5" is node 5 in the subgraph that node 3 stands for. The page's outputs have the subgraph's own name before the
// colon.
export function findNode(id) {
    let graph = app.rootGraph ?? app.graph, node;
    const parts = String(id).split(":");
    if (graph?.subgraphs?.has(parts[0])) {
        graph = graph.subgraphs.get(parts.shift());
    }
    for (const part of parts) {
        node = graph?.getNodeById(isNaN(part) ? part : Number(part));
        graph = node?.subgraph;
    }
    return node;
}
