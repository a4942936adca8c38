// A sheet of pictures, cut and played: on a canvas, and as a picture that moves by itself.
//
// The first pictures of the sheet are a clip and take turns. One behind them, if there is one, stands still beside it.

const LEAST_WIDTH = 512;        // of what is played: pages draw a picture no larger than it is

/** Where the pictures are: `how` is what the server said, width and height are the sheet's. */
export function cut({ columns, rows, frames, still, fps }, width, height) {
    return { columns, rows, frames, still, fps, width: width / columns, height: height / rows, beside: still > 0 ? 2 : 1 };
}

function corner({ columns, width, height }, number) {
    return [(number % columns) * width, Math.floor(number / columns) * height];
}

/** Width and height of what is played, in pixels. */
export function sizeOf({ width, height, beside }) {
    const scale = Math.max(1, LEAST_WIDTH / (width * beside));
    return [Math.round(width * beside * scale), Math.round(height * scale)];
}

/** The number of the picture that is shown at a time in milliseconds. A newer sheet goes on where the last one was. */
export function turnAt({ frames, fps }, time) {
    return Math.floor((time / 1000) * fps) % frames;
}

/** Draw the picture whose turn it is, and the one that stands still. */
export function paint(canvas, sheet, cells, time) {
    const pen = canvas.getContext("2d"), shown = [turnAt(cells, time)];
    if (cells.still > 0) {
        shown.push(cells.frames);
    }
    shown.forEach((number, place) => {
        const width = canvas.width / cells.beside;
        pen.drawImage(sheet, ...corner(cells, number), cells.width, cells.height, place * width, 0, width, canvas.height);
    });
}

function text(blob) {
    return new Promise((resolve, reject) => {
        const reader = new FileReader();
        reader.onload = () => resolve(reader.result);
        reader.onerror = () => reject(reader.error);
        reader.readAsDataURL(blob);
    });
}

/** The text of an SVG that plays a sheet, which it holds as `address`. */
export function drawing(address, cells, time) {
    const { columns, rows, width, height, frames, fps, still, beside } = cells, [wide, high] = sizeOf(cells);
    const seconds = frames / fps, begun = (time / 1000) % seconds;
    const turns = Array.from({ length: frames }, (_, number) => {
        const [x, y] = corner(cells, number);
        return `${(100 * number) / frames}%{transform:translate(${-x}px,${-y}px)}`;
    });
    const picture = (kind, x, y) => `<image ${kind} x="${x}" y="${y}" width="${columns * width}" `
        + `height="${rows * height}" href="${address}"/>`;
    const [x, y] = corner(cells, frames), place = `width="${width}" height="${height}" overflow="hidden"`;
    return `<svg xmlns="http://www.w3.org/2000/svg" width="${wide}" height="${high}" `
        + `viewBox="0 0 ${width * beside} ${height}"><style>@keyframes turns{${turns.join("")}}`
        + `.clip{animation:turns ${seconds}s step-end -${begun}s infinite}</style>`
        + `<svg ${place}>${picture('class="clip"', 0, 0)}</svg>`
        + (still > 0 ? `<svg x="${width}" ${place}>${picture("", -x, -y)}</svg>` : "") + "</svg>";
}

/** A picture file that plays a sheet. */
export async function movingPicture(blob, cells, time) {
    return new Blob([drawing(await text(blob), cells, time)], { type: "image/svg+xml" });
}
