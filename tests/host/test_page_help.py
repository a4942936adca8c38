"""The help page of a node in a real browser: its picture is loaded and fits the panel."""

import pytest

PICTURE = ".node-help-content img"


def open_help(page, kind):
    """Click on the title of a node of this kind and press (i) in the bar above it, as an artist does."""
    page.tab.evaluate("""kind => {
        app.canvas.select(app.graph._nodes.find(node => node.type === kind));
        return app.extensionManager.command.execute("Comfy.Canvas.FitView");        // of what is selected
    }""", kind)
    page.wait(1)
    place = page.tab.evaluate("""kind => {
        app.canvas.deselectAll();
        const node = app.graph._nodes.find(one => one.type === kind), { scale, offset } = app.canvas.ds;
        const { left, top } = app.canvas.canvas.getBoundingClientRect();
        return [left + (node.pos[0] + 80 + offset[0]) * scale, top + (node.pos[1] - 15 + offset[1]) * scale];
    }""", kind)
    page.tab.mouse.click(*place)
    # The bar is made anew while the view still moves, so that the mouse may miss it.
    button = "document.querySelector('[data-testid=info-button]')"
    page.tab.wait_for_function(f"() => {button}")
    page.tab.evaluate(f"() => {button}?.click()")


@pytest.mark.slow
def test_the_picture_of_a_help_page_is_seen_in_the_panel(page):
    page.open_template("windows")
    open_help(page, "VideoLDMFrameWindows")
    page.tab.wait_for_function("place => document.querySelector(place)?.complete", arg=PICTURE)
    address, width, shown, panel = page.tab.evaluate("""place => {
        const picture = document.querySelector(place), text = picture.closest(".node-help-content");
        const [one, other] = [picture, text].map(each => each.getBoundingClientRect());
        return [picture.src, picture.naturalWidth, [one.left, one.right], [other.left, other.right]];
    }""", PICTURE)
    assert address.endswith("/docs/pictures/VideoLDMFrameWindows.webp") and width == 700
    assert panel[0] <= shown[0] < shown[1] - 100 and shown[1] <= panel[1]
    assert page.errors() == []
