/// Search over configurations: what is drawn, what is kept on each rung, what
/// survives a kill, and what the report shows.

#include "test.h"

#include <peft/train/search.h>

#include <cmath>
#include <fstream>
#include <iterator>
#include <map>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#if PEFT_POSIX
#include <csignal>
#include <sys/wait.h>
#endif

namespace test_search {

namespace {

using peft::Configuration;
using peft::Outcome;
using peft::SearchBudget;
using peft::SearchResult;
using peft::SearchSpace;
using peft::Trial;
using Points = std::vector<std::pair<double, double>>;

SearchSpace small_space() {
  return SearchSpace()
      .integer("a", -1, 2)
      .integer("b", 5, 7)
      .categorical("c", {"x", "y \"z\""});
}

/// A result that depends on the configuration and the resource alone.
Outcome noise(const Configuration& c, int64_t resource) {
  std::seed_seq seeds{
      c.integer("a") + 9,
      c.integer("b"),
      resource,
      static_cast<int64_t>(c.category("c").size())};
  std::mt19937_64 engine(seeds);
  const double accuracy = static_cast<double>(engine() % 50) / 50.0;
  return Outcome(accuracy, static_cast<int64_t>(engine() % 7 + 1) * 100);
}

std::string read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}
void write(const std::string& path, const std::string& text) {
  std::ofstream(path, std::ios::binary) << text;
}

/// Everything of a trial but its time.
std::string text_of(const Trial& t) {
  auto line = peft::detail::to_json(t);
  line.erase("seconds");
  return line.dump();
}
std::string text_of(const SearchResult& result) {
  std::string text = result.complete ? "complete\n" : "\n";
  for (const auto& trial : result.trials) {
    text += text_of(trial) + "\n";
  }
  return text;
}

/// The points that no other dominates, one of equals, by comparing all pairs.
std::set<size_t> front_by_force(const Points& points) {
  std::set<size_t> front;
  for (size_t i = 0; i < points.size(); ++i) {
    bool dominated = false;
    for (size_t j = 0; j < points.size(); ++j) {
      const bool no_worse = points[j].first >= points[i].first &&
          points[j].second <= points[i].second;
      const bool better = points[j].first > points[i].first ||
          points[j].second < points[i].second;
      dominated = dominated || (no_worse && (better || j < i));
    }
    if (!dominated) {
      front.insert(i);
    }
  }
  return front;
}

} // namespace

TEST_CASE("a configuration is one value a dimension, and a JSON object") {
  const auto space = small_space().real("d", 1e-4, 1, true);
  CHECK_FALSE(space.size().has_value());
  CHECK(*small_space().size() == 4 * 3 * 2);
  std::set<std::string> seen;
  for (uint64_t i = 0; i < 24; ++i) {
    const auto c = small_space().at(i);
    seen.insert(c.to_string());
    CHECK(small_space().parse(small_space().encode(c).dump()) == c);
  }
  CHECK(seen.size() == 24);
  const auto c = Configuration()
                     .set("a", int64_t{2})
                     .set("b", int64_t{6})
                     .set("c", "y \"z\"")
                     .set("d", 0.1 + 0.2);
  CHECK(space.parse(space.encode(c).dump()) == c);
  CHECK(space.parse(R"({"d": 1, "c": "x", "a": -1, "b": 5})").real("d") == 1);
  CHECK(c.to_string() == "a=2 b=6 c=y \"z\" d=0.30000000000000004");
  CHECK(c.category("c") == "y \"z\"");

  const auto decode = [&](const std::string& text) {
    return error_of([&] { space.parse(text); });
  };
  CHECK(contains(
      decode(R"({"a": 1, "b": 5, "c": "x", "d": 0.1, "e": 1})"),
      "no dimension 'e'; it has 'a', 'b', 'c', 'd'"));
  CHECK(contains(
      decode(R"({"a": 1, "b": 5, "c": "x"})"), "lacks the dimension 'd'"));
  CHECK(contains(
      decode(R"({"a": 3, "b": 5, "c": "x", "d": 0.1})"),
      "'a' must be an integer from -1 to 2, got 3"));
  CHECK(contains(
      decode(R"({"a": 1.5, "b": 5, "c": "x", "d": 0.1})"),
      "'a' must be an integer from -1 to 2, got 1.5"));
  CHECK(contains(
      decode(R"({"a": 1, "b": 5, "c": "w", "d": 0.1})"),
      "'c' must be one of 'x', 'y \"z\"', got w"));
  CHECK(contains(
      decode(R"({"a": 1, "b": 5, "c": "x", "d": 2})"),
      "'d' must be a real number from 0.0001 to 1, got 2"));
  CHECK(
      contains(decode(R"({"a": true})"), "'a' is neither a number nor a word"));
  CHECK(contains(decode(R"({"a": 18446744073709551615})"), "'a' is too large"));
  CHECK(contains(decode("[1]"), "a configuration is a JSON object"));
  CHECK(contains(decode(R"({"a": 1, "a": 2})"), "given twice"));
  CHECK(contains(error_of([&] { c.integer("d"); }), "'d' is not an integer"));
  CHECK(contains(
      error_of([&] { c.real("z"); }), "no dimension 'z'; it has 'a', 'b'"));
}

TEST_CASE("a space refuses what is no dimension") {
  const double inf = std::numeric_limits<double>::infinity();
  CHECK(contains(
      error_of([] { SearchSpace().integer("a", 2, 1); }),
      "'a' goes from 2 to 1"));
  CHECK(contains(
      error_of([] { SearchSpace().real("a", 1, 1); }), "'a' goes from 1 to 1"));
  CHECK(contains(
      error_of([&] { SearchSpace().real("a", 1, inf); }),
      "two finite numbers"));
  CHECK(contains(
      error_of([] { SearchSpace().real("a", 0, 1, true); }),
      "must be positive; it begins at 0"));
  CHECK(contains(
      error_of([] { SearchSpace().categorical("a", {}); }),
      "nothing to choose from"));
  CHECK(contains(
      error_of([] {
        SearchSpace().categorical("a", {"x", "x"});
      }),
      "names 'x' twice"));
  CHECK(contains(
      error_of([] { SearchSpace().integer("a", 0, 1).real("a", 0, 1); }),
      "two dimensions 'a'"));
  CHECK(contains(error_of([] { SearchSpace().integer("", 0, 1); }), "a name"));
}

TEST_CASE("random search draws a shuffle of the space") {
  // Fisher and Yates, on an array, with the generator that the standard fixes.
  const auto space = small_space();
  for (const uint64_t seed : {0, 1, 12345}) {
    std::mt19937_64 engine(seed);
    std::vector<uint64_t> order(24);
    for (uint64_t i = 0; i < 24; ++i) {
      order[i] = i;
    }
    for (uint64_t i = 0; i < 24; ++i) {
      const uint64_t n = 24 - i;
      const uint64_t excess = (UINT64_MAX - n + 1) % n; // 2^64 mod n
      uint64_t x = engine();
      while (excess != 0 && x >= UINT64_MAX - excess + 1) {
        x = engine();
      }
      std::swap(order[i], order[i + x % n]);
    }
    const auto result =
        peft::search(space, noise, SearchBudget(100).seed(seed));
    REQUIRE(result.trials.size() == 24); // all that there are, none twice
    CHECK(result.complete);
    for (size_t i = 0; i < 24; ++i) {
      CHECK(result.trials[i].configuration == space.at(order[i]));
      CHECK(result.trials[i].number == static_cast<int64_t>(i));
    }
  }
}

TEST_CASE("every configuration is drawn as often as any other") {
  const auto space = SearchSpace().integer("a", 0, 2).integer("b", 0, 3);
  std::map<std::string, int> first, second;
  for (uint64_t seed = 0; seed < 1200; ++seed) {
    peft::detail::ConfigurationSampler sampler(space, seed);
    ++first[sampler.next()->to_string()];
    ++second[sampler.next()->to_string()];
  }
  for (const auto* counts : {&first, &second}) {
    CHECK(counts->size() == 12);
    double chi_square = 0;
    for (const auto& item : *counts) {
      chi_square += (item.second - 100.0) * (item.second - 100.0) / 100.0;
    }
    CHECK(chi_square < 31.3); // 99.9 % of 11 degrees of freedom
  }
}

TEST_CASE("real and huge dimensions are drawn within their bounds") {
  const auto space = SearchSpace()
                         .real("u", -3, 5)
                         .real("l", 1e-5, 1e-1, true)
                         .integer("i", INT64_MIN, INT64_MAX);
  peft::detail::ConfigurationSampler sampler(space, 3);
  double u = 0, l = 0;
  int64_t negative = 0;
  std::set<std::string> seen;
  const int count = 4000;
  for (int i = 0; i < count; ++i) {
    const auto c = sampler.next();
    REQUIRE(c);
    space.check(*c);
    u += c->real("u");
    l += std::log10(c->real("l"));
    negative += c->integer("i") < 0;
    seen.insert(c->to_string());
  }
  CHECK(seen.size() == count);
  // Four standard errors of a uniform mean, of a count.
  CHECK(std::abs(u / count - 1) < 4 * 8 / std::sqrt(12.0 * count));
  CHECK(std::abs(l / count + 3) < 4 * 4 / std::sqrt(12.0 * count));
  CHECK(std::abs(negative - count / 2.0) < 4 * std::sqrt(count) / 2);
}

TEST_CASE("a budget of parameters is kept before anything is trained") {
  const auto count = [](const Configuration& c) {
    return 10 * (c.integer("a") + 2) * c.integer("b");
  };
  const auto all = peft::search(small_space(), noise, SearchBudget(24).seed(4));
  int calls = 0;
  const auto objective = [&](const Configuration& c, int64_t resource) {
    ++calls;
    CHECK(count(c) <= 120);
    return Outcome(noise(c, resource).accuracy, {});
  };
  const auto fitting = peft::search(
      small_space(),
      objective,
      SearchBudget(24).seed(4).count_parameters(count).max_parameters(120));
  // What remains of the draws, in their order.
  size_t next = 0;
  for (const auto& trial : all.trials) {
    if (count(trial.configuration) <= 120) {
      REQUIRE(next < fitting.trials.size());
      const auto& other = fitting.trials[next++];
      CHECK(other.configuration == trial.configuration);
      CHECK(other.outcome.costs.at("parameters") == count(trial.configuration));
    }
  }
  CHECK(next == fitting.trials.size());
  CHECK(calls == static_cast<int>(next));
  CHECK(next == 2 * (3 + 2)); // a = -1: 50, 60, 70; a = 0: 100, 120; c is free

  const auto error = error_of([&] {
    peft::search(
        small_space(),
        objective,
        SearchBudget(3).count_parameters(count).max_parameters(49));
  });
  CHECK(contains(
      error, "no configuration of this space fits into a budget of 49"));
  CHECK(contains(error, "the smallest has 50"));
  CHECK(calls == static_cast<int>(next));
  CHECK(
      peft::search(
          small_space(),
          objective,
          SearchBudget(3).count_parameters(count).max_parameters(50))
          .trials.size() == 2);
  // Where not all can be drawn, the message says how many were.
  CHECK(contains(
      error_of([&] {
        peft::search(
            small_space().real("d", 0, 1),
            objective,
            SearchBudget(3).count_parameters(count).max_parameters(1).max_draws(
                7));
      }),
      "among 7 drawn"));
}

TEST_CASE("where() leaves configurations out") {
  const auto rule = [](const Configuration& c) { return c.integer("a") == 1; };
  const auto result =
      peft::search(small_space().where(rule), noise, SearchBudget(24));
  CHECK(result.trials.size() == 6);
  for (const auto& trial : result.trials) {
    CHECK(rule(trial.configuration));
  }
  CHECK(contains(
      error_of([&] {
        peft::search(
            small_space().where([](const auto&) { return false; }),
            noise,
            SearchBudget(1));
      }),
      "no configuration of this space passes the rules of where()"));
}

TEST_CASE("successive halving keeps the best of each rung") {
  for (const std::string promote : {"accuracy", "front"}) {
    INFO(promote);
    const auto budget =
        SearchBudget(23).seed(8).eta(2).rungs(4).resource(3).promote(promote);
    const auto result = peft::search(small_space(), noise, budget);
    CHECK(result.complete);
    std::vector<std::vector<Trial>> rungs(4);
    for (const auto& trial : result.trials) {
      rungs.at(trial.rung).push_back(trial);
      CHECK(trial.resource == 3 << trial.rung);
      CHECK(
          trial.outcome.accuracy ==
          noise(trial.configuration, trial.resource).accuracy);
    }
    const size_t sizes[] = {23, 11, 5, 2};
    for (size_t k = 0; k < 4; ++k) {
      REQUIRE(rungs[k].size() == sizes[k]);
      if (k == 0) {
        continue;
      }
      // By force: front after front, and within each the best one by one.
      auto left = rungs[k - 1];
      std::set<int64_t> best;
      while (best.size() < sizes[k]) {
        Points points;
        for (const auto& t : left) {
          points.emplace_back(
              t.outcome.accuracy, t.outcome.costs.at("parameters"));
        }
        std::set<size_t> candidates = front_by_force(points);
        if (promote == "accuracy") {
          for (size_t i = 0; i < left.size(); ++i) {
            candidates.insert(i);
          }
        }
        std::vector<size_t> taken;
        while (!candidates.empty() && best.size() < sizes[k]) {
          size_t top = *candidates.begin();
          for (const size_t i : candidates) {
            if (points[i].first > points[top].first ||
                (points[i].first == points[top].first &&
                 points[i].second < points[top].second)) {
              top = i;
            }
          }
          best.insert(left[top].number);
          candidates.erase(top);
          taken.push_back(top);
        }
        std::sort(taken.rbegin(), taken.rend());
        for (const size_t i : taken) {
          left.erase(left.begin() + static_cast<int64_t>(i));
        }
      }
      std::set<int64_t> kept;
      for (const auto& t : rungs[k]) {
        kept.insert(t.number);
      }
      CHECK(kept == best);
    }
    // The rest stands with what it reached last.
    CHECK(result.final_trials().size() == 23);
    CHECK(result.best().resource == 24);
  }
}

TEST_CASE("an objective that throws is recorded and not promoted") {
  const auto objective = [](const Configuration& c, int64_t resource) {
    if (c.integer("b") == 6) {
      throw std::runtime_error("six is \xff too much");
    }
    if (c.integer("b") == 7) {
      return Outcome(std::nan(""), 5);
    }
    return noise(c, resource);
  };
  const TemporaryDirectory folder;
  const auto budget =
      SearchBudget(24).eta(2).rungs(2).journal(folder / "journal");
  const auto result = peft::search(small_space(), objective, budget);
  CHECK(result.complete);
  int failed = 0;
  for (const auto& trial : result.trials) {
    const auto b = trial.configuration.integer("b");
    CHECK(trial.failed() == (b != 5));
    failed += trial.failed();
    CHECK((b != 6 || contains(trial.error, "too much")));
    CHECK((b != 7 || contains(trial.error, "gave nan for 'accuracy'")));
  }
  CHECK(failed == 16);
  CHECK(result.trials.size() == 24 + 8); // all that did not fail, fewer than 12
  CHECK(result.final_trials().size() == 8);
  int calls = 0;
  const auto again = peft::search(
      small_space(),
      [&](const Configuration&, int64_t) {
        ++calls;
        return Outcome();
      },
      budget);
  CHECK(calls == 0); // failures are not tried again
  CHECK(text_of(again) == text_of(result));

  // keep_going(false): the error comes out, and its trial is not kept.
  const auto strict =
      SearchBudget(24).keep_going(false).journal(folder / "strict");
  CHECK(contains(
      error_of([&] { peft::search(small_space(), objective, strict); }), ""));
  const auto kept = read(folder / "strict");
  CHECK_FALSE(contains(kept, "error"));
  const auto finished = peft::search(small_space(), noise, strict);
  CHECK(
      text_of(finished) ==
      text_of(peft::search(small_space(), noise, SearchBudget(24))));
}

TEST_CASE("a search goes on from its journal, whatever byte a kill left") {
  const TemporaryDirectory folder;
  const auto path = folder / "journal";
  int calls = 0;
  const auto objective = [&](const Configuration& c, int64_t resource) {
    ++calls;
    if (c.integer("a") == 0 && c.integer("b") == 5) {
      throw std::runtime_error("no\nluck");
    }
    auto outcome = noise(c, resource);
    // An objective that draws goes on with the draws that it would have had.
    outcome.costs["luck"] = torch::rand({}, torch::kDouble).item<double>();
    return outcome;
  };
  const auto budget =
      SearchBudget(12).seed(2).eta(2).rungs(3).promote("front").journal(path);
  const auto whole = peft::search(small_space(), objective, budget);
  CHECK(calls == 12 + 6 + 3);
  const auto text = read(path);
  CHECK(std::count(text.begin(), text.end(), '\n') == 1 + 21);
  // No journal, the same result.
  CHECK(
      text_of(peft::search(
          small_space(), objective, SearchBudget(budget).journal(""))) ==
      text_of(whole));

  size_t begin = text.size(); // of the last two lines
  for (int lines = 0; lines < 3; ++lines) {
    begin = text.rfind('\n', begin - 1);
  }
  const auto resume_from = [&](size_t bytes) {
    write(path, text.substr(0, bytes));
    calls = 0;
    const auto result = peft::search(small_space(), objective, budget);
    const auto lines = std::count(
        text.begin(), text.begin() + static_cast<int64_t>(bytes), '\n');
    CHECK(calls == 21 - std::max<int64_t>(0, lines - 1));
    CHECK(text_of(result) == text_of(whole));
    // The file is whole again: nothing is left to do.
    calls = 0;
    CHECK(
        text_of(peft::search(small_space(), objective, budget)) ==
        text_of(whole));
    CHECK(calls == 0);
  };
  for (size_t bytes = begin; bytes <= text.size(); ++bytes) {
    INFO(bytes);
    resume_from(bytes);
  }
  const size_t header = text.find('\n');
  for (const size_t bytes :
       {size_t{0}, size_t{1}, header - 1, header, header + 1, header + 20}) {
    INFO(bytes);
    resume_from(bytes);
  }
}

#if PEFT_POSIX
TEST_CASE("a search survives kill -9") {
  const TemporaryDirectory folder;
  const auto path = folder / "journal";
  const auto budget = SearchBudget(9).seed(1).eta(3).rungs(2).journal(path);
  const auto whole =
      peft::search(small_space(), noise, SearchBudget(budget).journal(""));
  for (int round = 1; round <= 3; ++round) { // each gets one trial further
    const pid_t child = ::fork();
    if (child == 0) {
      int calls = 0;
      peft::search(
          small_space(),
          [&](const Configuration& c, int64_t resource) {
            if (++calls == 2) {
              ::raise(SIGKILL);
            }
            return noise(c, resource);
          },
          budget);
      ::_exit(1);
    }
    int status = 0;
    REQUIRE(::waitpid(child, &status, 0) == child);
    REQUIRE(WIFSIGNALED(status));
    const auto text = read(path);
    CHECK(std::count(text.begin(), text.end(), '\n') == 1 + round);
  }
  int calls = 0;
  const auto result = peft::search(
      small_space(),
      [&](const Configuration& c, int64_t resource) {
        ++calls;
        return noise(c, resource);
      },
      budget);
  CHECK(calls == 12 - 3);
  CHECK(text_of(result) == text_of(whole));
}
#endif

TEST_CASE("a journal of another search is refused and left alone") {
  const TemporaryDirectory folder;
  const auto path = folder / "journal";
  const auto budget =
      SearchBudget(9).seed(1).eta(3).rungs(2).resource(2).journal(path);
  peft::search(small_space(), noise, budget);
  const auto text = read(path);
  const auto refusal = [&](const SearchSpace& space,
                           const SearchBudget& other) {
    int calls = 0;
    const auto error = error_of([&] {
      peft::search(
          space,
          [&](const Configuration& c, int64_t r) {
            ++calls;
            return noise(c, r);
          },
          other);
    });
    CHECK(calls == 0);
    CHECK(contains(error, path));
    return error;
  };
  const auto space = small_space();
  const auto count = [](const Configuration&) { return int64_t{1}; };
  const std::vector<std::pair<SearchBudget, std::string>> others{
      {SearchBudget(budget).trials(10), "its trials is 9, and here it is 10"},
      {SearchBudget(budget).seed(2), "its seed is 1, and here it is 2"},
      {SearchBudget(budget).eta(2), "its eta is 3, and here it is 2"},
      {SearchBudget(budget).rungs(1), "its rungs is 2, and here it is 1"},
      {SearchBudget(budget).resource(1), "its resource is 2, and here it is 1"},
      {SearchBudget(budget).promote("front"), "its promote is \"accuracy\""},
      {SearchBudget(budget).cost("time"), "its cost is \"parameters\""},
      {SearchBudget(budget).count_parameters(count).max_parameters(7),
       "its max_parameters is null, and here it is 7"}};
  for (const auto& [other, part] : others) {
    INFO(part);
    CHECK(contains(refusal(space, other), part));
    CHECK(read(path) == text);
  }
  CHECK(contains(
      refusal(SearchSpace().integer("a", -1, 2), budget), "its space is ["));
  // The same options with another rule draw other configurations.
  CHECK(contains(
      refusal(
          small_space().where(
              [](const Configuration& c) { return c.integer("a") > -1; }),
          budget),
      "has the configuration"));
  CHECK(read(path) == text);

  write(path, "somebody's notes, without a line's end");
  CHECK(contains(refusal(space, budget), "is not the journal of this search"));
  CHECK(read(path) == "somebody's notes, without a line's end");
  write(path, "{\"some\": \"json\"}\n");
  CHECK(contains(refusal(space, budget), "is not the journal of a search"));
  write(path, "some\ntext\n");
  CHECK(contains(refusal(space, budget), "line 1: not valid JSON"));
  CHECK(read(path) == "some\ntext\n");
  // A line in the middle that is damaged is not passed over.
  const size_t second = text.find('\n', text.find('\n') + 1);
  write(path, text.substr(0, second - 3) + text.substr(second));
  CHECK(contains(refusal(space, budget), "line 2: not valid JSON"));
  write(path, text + text.substr(second + 1));
  CHECK(contains(refusal(space, budget), "trials more than this search has"));

  // Nobody else writes to it meanwhile.
  write(path, "");
  const auto nested = error_of([&] {
    peft::search(
        space,
        [&](const Configuration& c, int64_t r) {
          peft::search(space, noise, budget);
          return noise(c, r);
        },
        SearchBudget(budget).keep_going(false));
  });
#if PEFT_POSIX
  CHECK(contains(nested, "open for writing already"));
#endif
  CHECK(contains(
      error_of([&] {
        peft::search(
            space, noise, SearchBudget(1).journal(folder / "no/such/folder"));
      }),
      "cannot open"));
}

TEST_CASE("a search can be watched and stopped") {
  const TemporaryDirectory folder;
  const auto path = folder / "journal";
  std::vector<std::pair<int64_t, int64_t>> steps;
  std::vector<double> left;
  auto budget = SearchBudget(4).eta(2).rungs(2).journal(path).progress(
      [&](const peft::SearchProgress& p) {
        steps.emplace_back(p.done, p.total);
        left.push_back(p.seconds_left);
        CHECK(p.trial.resource == (p.done <= 4 ? 1 : 2));
      });
  const auto whole = peft::search(small_space(), noise, budget);
  const std::vector<std::pair<int64_t, int64_t>> all{
      {1, 6}, {2, 6}, {3, 6}, {4, 6}, {5, 6}, {6, 6}};
  CHECK(steps == all);
  CHECK(left.back() == 0);
  for (size_t i = 0; i + 1 < left.size(); ++i) {
    CHECK(left[i] > 0);
  }
  // Four units of resource done and four to go: as long again.
  double seconds = 0;
  for (int i = 0; i < 4; ++i) {
    seconds += whole.trials[i].seconds;
  }
  CHECK(left[3] == Approx(seconds));

  // Stopped before the third trial, by the caller; within it, by the objective.
  for (const bool by_objective : {false, true}) {
    write(path, "");
    int calls = 0;
    auto stopping = budget;
    if (!by_objective) {
      stopping.should_stop([&] { return calls == 2; });
    }
    const auto part = peft::search(
        small_space(),
        [&](const Configuration& c, int64_t r) {
          if (++calls == 3) {
            throw peft::StopSearch();
          }
          return noise(c, r);
        },
        stopping);
    CHECK_FALSE(part.complete);
    CHECK(part.trials.size() == 2);
    CHECK(
        text_of(peft::search(small_space(), noise, budget)) == text_of(whole));
  }
}

TEST_CASE("a search says what does not fit") {
  const auto refusal = [](const SearchBudget& budget) {
    return error_of([&] { peft::search(small_space(), noise, budget); });
  };
  CHECK(contains(
      error_of([] { peft::search(SearchSpace(), noise, SearchBudget(1)); }),
      "the space of this search is empty"));
  CHECK(contains(
      error_of([] { peft::search(small_space(), {}, SearchBudget(1)); }),
      "needs an objective"));
  CHECK(contains(refusal(SearchBudget(0)), "1 trial or more, got 0"));
  CHECK(contains(refusal(SearchBudget(1).resource(0)), "resource must be"));
  CHECK(contains(refusal(SearchBudget(1).rungs(0)), "got 0 rungs"));
  CHECK(contains(refusal(SearchBudget(4).rungs(2).eta(1)), "an eta of 1"));
  CHECK(contains(
      refusal(SearchBudget(8).rungs(3).eta(3)), "leave nothing for rung 2"));
  CHECK(contains(refusal(SearchBudget(1).promote("luck")), "got 'luck'"));
  CHECK(contains(
      refusal(SearchBudget(1).max_parameters(5)), "needs count_parameters"));
  CHECK(contains(refusal(SearchBudget(1).max_draws(0)), "max_draws"));
  // A front needs its cost.
  const auto result = peft::search(
      small_space(), noise, SearchBudget(2).promote("front").cost("time"));
  CHECK(contains(
      result.trials.at(0).error,
      "trial 0 has no cost 'time'; it has 'parameters'"));
  CHECK(contains(
      error_of([&] { result.best(); }),
      "no trial of this search has a result"));
  CHECK(result.pareto().empty());
}

TEST_CASE("the Pareto front is what no other point dominates") {
  std::mt19937_64 engine(5);
  for (int round = 0; round < 400; ++round) {
    // Few values make ties in one or both, many make none.
    const uint64_t values = round % 2 == 0 ? 5 : 1000;
    Points points(engine() % 40);
    for (auto& p : points) {
      p = {
          static_cast<double>(engine() % values),
          static_cast<double>(engine() % values)};
    }
    const auto front = peft::pareto_front(points);
    CHECK(
        std::set<size_t>(front.begin(), front.end()) == front_by_force(points));
    for (size_t i = 1; i < front.size(); ++i) {
      CHECK(points[front[i - 1]].second < points[front[i]].second);
      CHECK(points[front[i - 1]].first < points[front[i]].first);
    }
  }
}

namespace {

/// Whether the tags of a page are balanced and its attributes quoted.
bool is_well_formed(const std::string& page) {
  std::vector<std::string> open;
  size_t at = page.find("<html");
  while ((at = page.find('<', at)) != std::string::npos) {
    const size_t end = page.find('>', at);
    if (end == std::string::npos) {
      return false;
    }
    const std::string tag = page.substr(at + 1, end - at - 1);
    const std::string name = tag.substr(0, tag.find_first_of(" /", 1));
    if (std::count(tag.begin(), tag.end(), '"') % 2 != 0 ||
        tag.find('<') != std::string::npos) {
      return false;
    }
    if (tag[0] == '/') {
      if (open.empty() || "/" + open.back() != tag) {
        return false;
      }
      open.pop_back();
    } else if (tag.back() != '/') {
      open.push_back(name);
    }
    at = end;
  }
  return open.empty();
}

SearchResult cloud(int count, uint64_t seed, double decades) {
  std::mt19937_64 engine(seed);
  const auto unit = [&] {
    return static_cast<double>(engine() >> 11) * 0x1p-53;
  };
  SearchResult result;
  result.complete = true;
  for (int i = 0; i < count; ++i) {
    Trial trial;
    trial.number = i;
    trial.configuration.set("k", int64_t{i}).set("name", "a<b & \"c\"");
    const double u = unit();
    trial.outcome = Outcome(
        0.5 + 0.1 * u + 0.05 * unit(),
        static_cast<int64_t>(1000 * std::pow(10.0, decades * u)));
    result.trials.push_back(trial);
  }
  return result;
}

} // namespace

TEST_CASE("the front as a table") {
  SearchResult result;
  const std::vector<std::tuple<double, int64_t, std::string>> rows{
      {0.8, 1605120, ""}, {0.75, 300, ""}, {0.7, 300, ""}, {0, 0, "broke"}};
  for (const auto& [accuracy, count, error] : rows) {
    Trial trial;
    trial.number = static_cast<int64_t>(result.trials.size());
    trial.configuration.set("r", trial.number).set("m", "x");
    trial.outcome = Outcome(accuracy, count);
    trial.error = error;
    result.trials.push_back(trial);
  }
  CHECK(
      peft::pareto_table(result) ==
      "parameters  accuracy  resource  trial  configuration\n"
      "       300    0.7500         1      1  r=1 m=x\n"
      " 1,605,120    0.8000         1      0  r=0 m=x\n"
      "4 trials of 4 configurations, 1 failed; the search is not complete\n");
}

TEST_CASE("the picture is well-formed and its labels stand free") {
  using peft::detail::Box;
  size_t labels = 0, placed = 0;
  for (int round = 0; round < 60; ++round) {
    const int count = 1 + round * 3;
    const auto result = cloud(count, round, round % 5);
    INFO(round);
    const auto page = peft::pareto_html(result, "A <search> & more");
    CHECK(is_well_formed(page));
    CHECK_FALSE(contains(page, "nan"));
    CHECK_FALSE(contains(page, "inf"));
    CHECK(contains(page, "number of trainable parameters (log scale)"));
    CHECK(contains(page, "a&lt;b &amp; &quot;c&quot;"));
    CHECK_FALSE(contains(page, "http://www.w3.org/1999/")); // nothing fetched
    size_t circles = 0;
    for (size_t at = 0; (at = page.find("<circle", at)) != page.npos; ++at) {
      ++circles;
    }
    CHECK(circles == static_cast<size_t>(count));

    // The same places once more, against each other and all that is drawn.
    std::vector<peft::PicturePoint> points;
    for (const auto& trial : result.trials) {
      points.push_back(
          {trial.outcome.costs.at("parameters"),
           trial.outcome.accuracy,
           false,
           "",
           ""});
    }
    const peft::detail::PictureAxes axes(points);
    Points centres;
    std::vector<std::string> texts;
    for (const auto& p : points) {
      centres.emplace_back(axes.x(p.cost), axes.y(p.accuracy));
      texts.push_back(texts.size() % 4 == 0 ? "trial 123" : "");
      CHECK(axes.plot().contains(
          {centres.back().first - 4,
           centres.back().second - 4,
           centres.back().first + 4,
           centres.back().second + 4}));
    }
    const std::vector<Box> line{{100, 200, 600, 202}};
    const auto boxes =
        peft::detail::place_labels(centres, texts, line, axes.plot());
    for (size_t i = 0; i < boxes.size(); ++i) {
      labels += texts[i].empty() ? 0 : 1;
      if (!boxes[i]) {
        continue;
      }
      ++placed;
      CHECK_FALSE(texts[i].empty());
      CHECK(axes.plot().contains(*boxes[i]));
      CHECK_FALSE(boxes[i]->overlaps(line[0]));
      for (size_t j = 0; j < boxes.size(); ++j) {
        CHECK((i == j || !boxes[j] || !boxes[i]->overlaps(*boxes[j])));
        const auto [x, y] = centres[j];
        CHECK_FALSE(boxes[i]->overlaps({x - 5, y - 5, x + 5, y + 5}));
      }
    }
    // Ticks: two or more on each axis, their texts apart.
    const auto ticks = axes.cost_ticks();
    CHECK(ticks.size() >= 2);
    for (size_t i = 1; i < ticks.size(); ++i) {
      const auto half = [](double value) {
        return peft::detail::text_width(peft::detail::short_number(value)) / 2;
      };
      CHECK(
          axes.x(ticks[i]) - half(ticks[i]) >
          axes.x(ticks[i - 1]) + half(ticks[i - 1]));
      CHECK(
          peft::detail::short_number(ticks[i]) !=
          peft::detail::short_number(ticks[i - 1]));
    }
    CHECK(axes.accuracy_ticks().size() >= 3);
  }
  CHECK(placed > labels / 2);

  // A page is written whole, and an empty search has one too.
  const TemporaryDirectory folder;
  peft::write_pareto(cloud(9, 1, 3), folder / "report.html", "Nine");
  CHECK(
      read(folder / "report.html") ==
      peft::pareto_html(cloud(9, 1, 3), "Nine"));
  CHECK(contains(peft::pareto_html({}, "None"), "No trial has a result"));
  CHECK(contains(
      error_of([] { peft::pareto_html(cloud(2, 1, 1), "t", "seconds"); }),
      "no cost 'seconds'"));
}

} // namespace test_search
