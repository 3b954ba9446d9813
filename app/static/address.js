// The address bar shows what the page shows, so that it can be reloaded, shared and gone back from. Tabs write links to
// their content (`a.address`); the newest of the open tab is the page's address. Content changes without a request only
// where the browser goes back or forward: then the page is loaded again, and reads its address.
(() => {
  const links = {};
  const tabOf = (address) => (new URLSearchParams(address).get('tab') ?? '').toLowerCase();
  const open = () =>
    document.querySelector('#tabs button[role=tab][aria-selected=true]')?.textContent.trim().toLowerCase() ?? '';
  const go = (address, replaces) => {
    if (address === location.search) return;
    history[replaces ? 'replaceState' : 'pushState'](null, '', address);
  };
  // An image of a gallery that is classified or compared; results know models and labels only.
  const withImage = (address) => {
    const now = new URLSearchParams(location.search), next = new URLSearchParams(address);
    if (tabOf(location.search) !== tabOf(address) || !next.has('keeps-image')) return address;
    next.delete('keeps-image');
    for (const key of ['gallery', 'image']) if (now.get(key)) next.set(key, now.get(key));
    return `?${next}`;
  };
  const read = () => {
    for (const link of document.querySelectorAll('a.address')) {
      const address = link.getAttribute('href'), tab = tabOf(address);
      if (links[tab] === address) continue;
      const isFirst = !(tab in links);
      links[tab] = address;
      if (tab === open()) go(withImage(address), isFirst && tabOf(location.search) === tab);
    }
  };
  const watch = () => new MutationObserver(read).observe(document.body, {
    subtree: true, childList: true, attributes: true, attributeFilter: ['href'],
  });
  if (document.body) watch();
  else document.addEventListener('DOMContentLoaded', watch);
  document.addEventListener('click', (event) => {
    const tab = event.target.closest?.('#tabs button[role=tab]');
    if (tab) {
      const name = tab.textContent.trim().toLowerCase();
      setTimeout(() => go(links[name] ?? `?tab=${encodeURIComponent(name)}`));
    }
    const card = event.target.closest?.('[id$=-examples] button.card');
    if (card) go(`?${new URLSearchParams({tab: open(), gallery: card.dataset.gallery, image: card.dataset.id})}`);
    const similar = event.target.closest?.('[id$=-similar] button.card');
    if (similar) {
      const {gallery, id} = similar.dataset;
      location.search = `?${new URLSearchParams({tab: 'explore', gallery, view: 'One image', image: id})}`;
    }
  });
  window.addEventListener('popstate', () => location.reload());
})();
