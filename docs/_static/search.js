// Sphinx 9.0 lists a page once more for each of its index entries, whose anchors hold no text: then there is no
// summary, and an error. Let an index entry lead to the beginning of its page, and list each page once.
if (typeof Search !== "undefined") {
  const search = Search._performSearch;
  Search._performSearch = (...given) => {
    const seen = new Set();
    const best = search(...given).reverse();
    for (const result of best) if (result[6] === SearchResultKind.index) result[2] = "";
    const once = best.filter(([page, , anchor, , , , kind]) => {
      if (anchor || kind === SearchResultKind.object) return true;
      return !seen.has(page) && seen.add(page);
    });
    return once.reverse();
  };
}
