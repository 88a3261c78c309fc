'use strict';
for (const table of document.querySelectorAll('table.sortable')) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const compare = (x, y, sign) => {
    const a = x.dataset.value, b = y.dataset.value;
    if (a === undefined)  // a name
      return sign * x.textContent.localeCompare(y.textContent, 'en', {numeric: true});
    if (a === '' || b === '') return (a === '') - (b === '');  // undefined: always last
    return sign * (a - b);
  };
  heads.forEach((head, column) => head.firstElementChild.addEventListener('click', () => {
    const way = head.getAttribute('aria-sort') === 'ascending' ? 'descending' : 'ascending';
    for (const other of heads) other.setAttribute('aria-sort', other === head ? way : 'none');
    const sign = way === 'ascending' ? 1 : -1;
    const rows = [...body.rows];
    rows.sort((x, y) => compare(x.cells[column], y.cells[column], sign));
    body.append(...rows);
  }));
}
const pictures = JSON.parse(document.getElementById('pictures').textContent);
for (const article of document.querySelectorAll('.case')) {
  const found = pictures[article.dataset.case];
  const slider = article.querySelector('input'), output = article.querySelector('output');
  const images = [];
  for (const stack of article.querySelectorAll('.stack')) {
    const layer = stack.dataset.layer;
    const layers = layer === 'image' || layer === 'probability' ? [layer] : ['image', layer];
    for (const name of layers) images.push({name, layer, element: new Image()});
    stack.append(...images.slice(-layers.length).map(image => image.element));
  }
  const show = () => {
    const d = Number(slider.value);
    output.value = `${found.number[d]} (${d + 1} of ${found.number.length})`;
    slider.setAttribute('aria-valuetext', `slice ${found.number[d]}`);
    for (const {name, layer, element} of images) {
      element.src = found[name][d];
      element.alt = name === layer ? `${layer}, slice ${found.number[d]}` : '';
    }
  };
  slider.addEventListener('input', show);
  show();
}
addEventListener('beforeprint', () => {
  for (const details of document.querySelectorAll('details')) details.open = true;
});
