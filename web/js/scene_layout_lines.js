// The lines of Scene Layout's text: x y width height colour. Nothing here needs a page.
//
// Edits keep what the artist wrote: other lines, comments, and numbers that did not change. nodes/box_lines.py reads
// the same lines and says more about a wrong one.
//
// `limits` is what the chosen layout file knows: { most_boxes, colours: { name: "#rrggbb" } }, or undefined.

const LINE = /^(\s*)((?:[^\s#]+\s+){4}(?:#[0-9a-zA-Z]+|[^\s#]+))(.*)$/;
const NUMBER = /^[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?$/i;
const HEX = /^#[0-9a-f]{6}$/i;
const UNKNOWN = "#a0a0a0";      // paint of a colour that has none
const EDGE = 1e-6;              // a box may reach this far beyond the picture, by rounding
const FARTHEST = 0.15;          // as in nodes/box_colours.py
const LIGHTNESS = 0.25;
const STEPS = 1000;             // numbers are written to three places
const NUMBER_WORDS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"];

export const SMALLEST = 0.01;   // side of the smallest box that the mouse makes

/** What a text says: { boxes, faults, none }. A box has a line (from 0), x, y, width, height, word and colour. */
export function read(text, limits) {
    const found = { boxes: [], faults: [], none: false };
    text.split("\n").forEach((raw, line) => {
        const said = raw.replace(/,/g, " ");
        const match = LINE.exec(said);
        const box = match && boxOf(match, limits);
        if (box?.fault) {
            found.faults.push(`Line ${line + 1}: ${box.fault}`);
        } else if (box) {
            found.boxes.push({ line, ...box });
        } else if (isNone(said)) {
            found.none = true;
        } else if (withoutComment(said)) {
            found.faults.push(`Line ${line + 1} is no box. Write x y width height colour.`);
        }
    });
    return found;
}

function withoutComment(line) {
    return line.replace(/#.*/, "").trim();
}

function isNone(line) {
    return withoutComment(line) === "none";
}

/** A line that has five words as a box, or as { fault }. null if it has more words. */
function boxOf([, , five, rest], limits) {
    if (withoutComment(rest)) {
        return null;
    }
    const words = five.split(/\s+/);
    const word = words.pop();
    if (!words.every((one) => NUMBER.test(one))) {
        return null;
    }
    const [x, y, width, height] = words.map(Number);
    if (Math.max(x, y, width, height) >= 2) {
        return { fault: "write fractions of the picture, from 0 to 1, not pixels." };
    }
    if (!(width > 0 && height > 0) || Math.min(x, y) < -EDGE || Math.max(x + width, y + height) > 1 + EDGE) {
        return { fault: "the box must lie inside the picture, from 0 to 1." };
    }
    const colour = colourOf(word, limits);
    if (colour === null) {
        return { fault: `${word} is none of ${Object.keys(limits.colours).join(", ")}.` };
    }
    return { x, y, width, height, word, colour };
}

/** The file's colour for a word. null if it has none. */
function colourOf(word, limits) {
    if (!limits || word.toLowerCase() in limits.colours) {
        return word.toLowerCase();
    }
    return HEX.test(word) ? nearest(word, limits.colours) : null;
}

/** The #rrggbb in which a box is drawn. */
export function paintOf(box, limits) {
    return limits?.colours[box.colour] ?? (HEX.test(box.word) ? box.word : UNKNOWN);
}

/** The name of the nearest of { name: "#rrggbb" }, or null if none is near. As in nodes/box_colours.py. */
export function nearest(hex, colours) {
    const wanted = oklab(hex);
    let best = null;
    let least = FARTHEST;
    for (const [name, paint] of Object.entries(colours)) {
        const [light, a, b] = oklab(paint).map((value, axis) => value - wanted[axis]);
        const far = Math.hypot(LIGHTNESS * light, a, b);
        if (paint !== UNKNOWN && far <= least && (best === null || far < least)) {
            [best, least] = [name, far];
        }
    }
    return best;
}

function oklab(hex) {
    const [r, g, b] = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16) / 255)
        .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
    const long = Math.cbrt(0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b);
    const middle = Math.cbrt(0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b);
    const short = Math.cbrt(0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b);
    return [
        0.2104542553 * long + 0.7936177850 * middle - 0.0040720468 * short,
        1.9779984951 * long - 2.4285922050 * middle + 0.4505937099 * short,
        0.0259040371 * long + 0.7827717662 * middle - 0.8086757660 * short,
    ];
}

// Edits. Each gives the new text.

/** The text with another box on its line. Numbers that did not change keep their digits, and a comment stays. */
export function replace(text, box) {
    const lines = text.split("\n");
    const raw = lines[box.line];
    const [, indent, five] = LINE.exec(raw.replace(/,/g, " "));
    const before = five.split(/\s+/);
    const numbers = [box.x, box.y, box.width, box.height]
        .map((value, axis) => (Number(before[axis]) === value ? before[axis] : written(value)));
    lines[box.line] = [indent, [...numbers, box.word].join(" "), raw.slice(indent.length + five.length)].join("");
    return lines.join("\n");
}

/** The text with one more box at its end. The word none gives way. */
export function add(text, box) {
    const lines = text.split("\n").filter((line) => !isNone(line));
    while (lines.length && !lines[lines.length - 1].trim()) {
        lines.pop();
    }
    return [...lines, [...[box.x, box.y, box.width, box.height].map(written), box.word].join(" ")].join("\n");
}

/** The text without a box's line. Without its last box it says none: an empty text would let cars stand anywhere. */
export function remove(text, box) {
    const lines = text.split("\n");
    lines.splice(box.line, 1);
    const left = read(lines.join("\n"));
    if (!left.boxes.length && !left.faults.length && !left.none) {
        lines.push("none");
    }
    return lines.filter((line, at) => at < lines.length - 1 || line.trim()).join("\n");
}

function written(value) {
    return String(Math.round(value * STEPS) / STEPS);
}

// Geometry, in fractions of the picture

/** The box moved by dx, dy, inside the picture. */
export function moved(box, dx, dy) {
    const along = (at, size, by) => snapped(Math.min(Math.max(at + by, 0), 1 - size), Math.floor);
    return {
        ...box,
        x: dx ? along(box.x, box.width, dx) : box.x,
        y: dy ? along(box.y, box.height, dy) : box.y,
    };
}

/** The box between two points, inside the picture and no smaller than SMALLEST. */
export function between(x0, y0, x1, y1) {
    const [left, right] = span(x0, x1);
    const [top, bottom] = span(y0, y1);
    return { x: left, y: top, width: snapped(right - left), height: snapped(bottom - top) };
}

function span(one, other) {
    const [low, high] = [Math.min(one, other), Math.max(one, other)].map((at) => snapped(Math.min(Math.max(at, 0), 1)));
    return high - low >= SMALLEST ? [low, high] : low + SMALLEST <= 1 ? [low, snapped(low + SMALLEST)]
        : [snapped(high - SMALLEST), high];
}

function snapped(value, rounding = Math.round) {
    return Math.max(rounding(value * STEPS + (rounding === Math.floor ? EDGE : 0)) / STEPS, 0);
}

// Words

/** What the page says below the picture. */
export function say(found, limits) {
    if (found.none && found.boxes.length) {
        return "none stands beside boxes. Take it out.";
    }
    if (found.faults.length) {
        return found.faults[0];
    }
    const most = limits?.most_boxes;
    const count = found.boxes.length;
    if (most && count > most) {
        return `${count} boxes, and this file knows at most ${inWords(most)}. Remove ${count - most}.`;
    }
    const room = most ? `At most ${inWords(most)} ${most === 1 ? "box" : "boxes"}. ` : "";
    if (!count) {
        return found.none ? `No cars. ${room}Drag to draw.` : `Cars stand anywhere. ${room}Drag to draw.`;
    }
    const taken = limits ? found.boxes.filter((box) => box.word.startsWith("#")) : [];
    if (taken.length) {
        return taken.map((box) => `Line ${box.line + 1}: ${box.word} is taken as ${box.colour}.`).join(" ");
    }
    return most ? `${count} of at most ${inWords(most)} ${most === 1 ? "box" : "boxes"}, in fractions of the picture.`
        : "Boxes are fractions of the picture.";
}

function inWords(number) {
    return NUMBER_WORDS[number] ?? String(number);
}
