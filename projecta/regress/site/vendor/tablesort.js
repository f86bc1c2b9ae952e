/* Tables that sort by a click on a heading, or Enter on it; the interface that asv's pages expect.
 * A heading names its order in data-sort: int, float, string, or one given to stupidtable(). */
(function ($) {
    "use strict";
    var text = function (a, b) { return a < b ? -1 : a > b ? 1 : 0; };
    var number = function (a, b) { return parseFloat(a) - parseFloat(b); };

    function sortBy(heading, direction) {
        var table = heading.closest("table");
        var orders = $.extend({int: number, float: number, string: text}, table.data("orders"));
        var order = orders[heading.data("sort")];
        if (!order) { return heading; }
        direction = direction || (heading.data("direction") === "asc" ? "desc" : "asc");
        var column = heading.index();
        var what = {column: column, direction: direction};
        table.trigger("beforetablesort", what);
        var sign = direction === "asc" ? 1 : -1;
        var rows = table.children("tbody").children("tr").toArray().map(function (row, place) {
            var cell = $(row).children().eq(column), value = cell.attr("data-sort-value");
            return {row: row, place: place, value: value === undefined ? cell.text() : value};
        });
        rows.sort(function (a, b) { return sign * order(a.value, b.value) || a.place - b.place; });
        table.children("tbody").append(rows.map(function (found) { return found.row; }));
        table.find("thead th").removeData("direction").removeAttr("aria-sort");
        heading.data("direction", direction);
        heading.attr("aria-sort", direction === "asc" ? "ascending" : "descending");
        table.trigger("aftertablesort", what);
        return heading;
    }

    $.fn.stupidtable = function (orders) {
        return this.each(function () {
            var headings = $(this).data("orders", orders || {}).find("thead th[data-sort]");
            headings.attr("tabindex", 0).on("click keydown", function (event) {
                if (event.type === "click" || event.key === "Enter") { sortBy($(this)); }
            });
        });
    };
    $.fn.stupidsort = function (direction) {
        return this.each(function () { sortBy($(this), direction); });
    };
}(jQuery));
