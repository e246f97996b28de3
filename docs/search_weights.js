// The order of what the search finds: a page or section that has the word in its title comes before one that has it in
// its text, and a page that explains before one that lists.
var Scorer = {
  score: ([docname, title, anchor, description, score, filename, kind]) => score + weight(docname),
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 30,
  partialTitle: 12,
  term: 5,
  partialTerm: 2,
};

const EXPLAIN = ["concepts", "specification", "balancing", "upcycling", "fine_tuning", "saving_and_exporting", "published_mixtures", "distributed/index", "distributed/data_parallel", "troubleshooting", "glossary", "training", "getting_started", "arguments"];
const LIST = ["experiments", "performance", "correctness", "versions", "migration"];

function weight(docname) {
  if (EXPLAIN.includes(docname)) return 3;
  return LIST.includes(docname) || docname.startsWith("api/") ? -1 : 1;
}
