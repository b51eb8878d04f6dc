// Sphinx 9.0 finds no summary for an index entry, whose anchor holds no text, and then stops with an error.
// Take the summary from the page's beginning instead.
if (typeof Search !== "undefined") {
  const summary = Search.makeSearchSummary;
  Search.makeSearchSummary = (text, words, anchor) =>
    summary(text, words, anchor) ?? summary(text, words, "") ?? document.createElement("p");
}
