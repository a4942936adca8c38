// What tests/host/page.py asks of ComfyUI's page. It reads the page and changes nothing but widgets.
() => {
    const SERVER_ENDS = ["execution_success", "execution_error", "execution_interrupted"];
    const nodes = () => app.graph._nodes;
    const visible = element => element.isConnected && element.getClientRects().length > 0
        && getComputedStyle(element).visibility !== "hidden";
    const drawn = id => document.querySelector(`[data-node-id="${id}"]`);      // of Vue's rendering
    let ended = null;

    // A rectangle of the screen in the units of the graph.
    function inGraph(rectangle) {
        const { scale, offset } = app.canvas.ds, canvas = app.canvas.canvas.getBoundingClientRect();
        const x = value => (value - canvas.left) / scale - offset[0], y = value => (value - canvas.top) / scale - offset[1];
        return [x(rectangle.left), y(rectangle.top), x(rectangle.right), y(rectangle.bottom)];
    }

    function union(one, other) {
        return [Math.min(one[0], other[0]), Math.min(one[1], other[1]),
                Math.max(one[2], other[2]), Math.max(one[3], other[3])];
    }

    // A node of the canvas: its frame, all its widgets, and the page's elements that float above it.
    function onCanvas(node) {
        const [x, y, width, height] = node.boundingRect ?? node.getBounding();
        let box = [x, y, x + width, y + height];
        if (!node.flags?.collapsed) {
            box[3] = Math.max(box[3], node.pos[1] + node.computeSize()[1]);
            for (const { element } of node.widgets ?? []) {
                if (element && visible(element)) {
                    box = union(box, inGraph(element.getBoundingClientRect()));
                }
            }
        }
        return box;
    }

    // What a node shows: elements of Vue's node, elements of its widgets, and pictures drawn on the canvas.
    function media(node, tag) {
        const parents = [drawn(node.id), ...(node.widgets ?? []).map(widget => widget.element)].filter(Boolean);
        const found = parents.flatMap(parent => parent.matches(tag) ? [parent] : [...parent.querySelectorAll(tag)]);
        const plain = tag === "img" ? (node.imgs ?? []) : [];
        return [...new Set(found.length ? found : plain)];
    }

    const shownBy = node => [...media(node, "video"), ...media(node, "img")].filter(element => element.src);
    const nameOf = source => new URL(source, location.href).searchParams.get("filename") ?? source.slice(0, 60);

    window.pageTest = {
        boxes(vue) {
            return nodes().map(node => {
                const element = vue ? drawn(node.id) : null;
                const box = element ? inGraph(element.getBoundingClientRect()) : onCanvas(node);
                const [left, top, right, bottom] = box.map(value => Math.round(value * 10) / 10);
                return { node: Number(node.id), type: node.type, left, top, right, bottom };
            });
        },

        // The boxes in pixels of the screen.
        seen(vue) {
            const { scale, offset } = app.canvas.ds, canvas = app.canvas.canvas.getBoundingClientRect();
            const x = value => scale * (value + offset[0]) + canvas.left;
            const y = value => scale * (value + offset[1]) + canvas.top;
            return this.boxes(vue).map(box => ({ ...box, left: x(box.left), top: y(box.top), right: x(box.right),
                                                 bottom: y(box.bottom) }));
        },

        // Mark the graph that is there, so that the next one of the same ids is told from it.
        forget() {
            for (const node of nodes()) {
                node.pageTestOld = true;
            }
        },

        holds(ids) {
            const now = nodes().filter(node => !node.pageTestOld).map(node => Number(node.id)).sort((a, b) => a - b);
            return now.length === nodes().length && JSON.stringify(now) === JSON.stringify(ids);
        },

        setWidgets(name, value, kind) {
            let count = 0;
            for (const node of nodes().filter(node => !kind || node.type === kind)) {
                for (const widget of (node.widgets ?? []).filter(widget => widget.name === name)) {
                    widget.value = value;
                    widget.callback?.(value, app.canvas, node);
                    count += 1;
                }
            }
            return count;
        },

        listen() {
            ended = null;
            if (!this.listens) {
                for (const kind of SERVER_ENDS) {
                    app.api.addEventListener(kind, event => {
                        ended = [kind, event.detail?.exception_message ?? ""];
                    });
                }
                this.listens = true;
            }
        },

        state() {
            const refused = Object.values(app.lastNodeErrors ?? {}).flatMap(found => found.errors ?? []);
            const end = ended ?? (refused.length ? ["refused", JSON.stringify(refused)] : null);
            const previews = nodes().filter(node => shownBy(node).length).map(node => Number(node.id));
            return { ended: end?.[0] ?? null, message: end?.[1] ?? "", previews };
        },

        dialogs() {
            return [...document.querySelectorAll("[role=dialog], .p-dialog, .comfy-modal")].filter(visible)
                .map(element => element.innerText.trim());
        },

        errors() {
            const found = [];
            for (const node of nodes()) {
                if (!LiteGraph.registered_node_types[node.type]) {
                    found.push(`unknown node: ${node.id} (${node.type})`);
                } else if (node.has_errors) {
                    found.push(`red node: ${node.id} (${node.type})`);
                }
            }
            for (const toast of document.querySelectorAll(".p-toast-message-error, .p-toast-message-warn")) {
                found.push(`message: ${toast.innerText.trim()}`);
            }
            return found;
        },

        // Wait until what the nodes show has been read, or cannot be, and press play on videos that stand still.
        // Whether each had begun before.
        async play(kind) {
            await this.ready(kind);
            const shown = nodes().filter(node => node.type === kind).flatMap(shownBy);
            const began = shown.map(element => element.tagName === "VIDEO" && !element.paused);
            await Promise.all(shown.map(async element => {
                if (element.tagName === "VIDEO" && element.paused && !element.error) {
                    await element.play();
                }
            }));
            return began;
        },

        async ready(kind) {
            const isRead = element => element.error || (element.tagName === "VIDEO" ? element.readyState >= 3
                : element.complete);
            for (let look = 0; look < 100; look++) {
                const shown = nodes().filter(node => node.type === kind).flatMap(shownBy);
                if (shown.length && shown.every(isRead)) {
                    return;
                }
                await new Promise(done => setTimeout(done, 100));
            }
        },

        players(kind) {
            return nodes().filter(node => node.type === kind).flatMap(node => shownBy(node).map(element => {
                const video = element.tagName === "VIDEO";
                return {
                    node: Number(node.id), kind: video ? "video" : "img", file: nameOf(element.src),
                    width: (video ? element.videoWidth : element.naturalWidth) || 0,
                    height: (video ? element.videoHeight : element.naturalHeight) || 0,
                    duration: video && Number.isFinite(element.duration) ? element.duration : 0,
                    loops: video && element.loop, time: video ? element.currentTime : 0,
                    error: element.error?.message ?? "",
                };
            }));
        },
    };
}
