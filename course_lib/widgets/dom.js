// Stands before every widget's own JavaScript.
// JupyterLab moves between notebook cells with the arrow keys, unless the element in focus itself says to leave them alone.
const KEEP_KEYS = { "data-lm-suppress-shortcuts": "true" };

// A node with its attributes; children that are strings go in as text, so nothing can inject markup.
function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const count = (n, what) => `${n.toLocaleString("en")} ${what}${n === 1 ? "" : "s"}`;
