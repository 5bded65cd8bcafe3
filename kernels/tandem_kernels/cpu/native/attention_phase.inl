// Attention as a part of a region: its work is listed before, for every window that the layers have.

template <class T>
static int64_t bench_floats(const Attention& a, const AttentionShape& shape) {
  return Workbench<T>::floats(shape, chunk_rows(a) * shape.shared);
}

// The units of all layers that have one window.
struct WindowUnits {
  int64_t window;
  UnitList list;
  int64_t first_unit, first_merge;  // where its part of the scratch memory begins
};

// Make room for a batch and list its units for each of some windows. One thread, before a region:
// nothing is changed while threads may look at it.
template <class T>
static void prepare_attention(Scratch& scratch, Attention a, int threads, WindowUnits* windows,
                              int64_t count) {
  const AttentionShape shape = shape_of<T>(a);
  int64_t units = 0, merges = 0, partials = 0;
  for (WindowUnits* each = windows; each < windows + count; ++each) {
    a.window = each->window;
    each->list = list_units(a, threads, nullptr, nullptr);
    each->first_unit = units;
    each->first_merge = merges;
    units += each->list.units;
    merges += each->list.merges;
    partials = most_of(partials, each->list.partials);
  }
  scratch.units.reserve((units + 1) * static_cast<int64_t>(sizeof(Unit)));
  scratch.merges.reserve((merges + 1) * static_cast<int64_t>(sizeof(Merge)));
  scratch.partials.reserve((partials * Workbench<T>::partial_size(shape.columns) + 1) * 4);
  scratch.per_thread.reserve(threads * bench_floats<T>(a, shape) * 4);
  for (const WindowUnits* each = windows; each < windows + count; ++each) {
    a.window = each->window;
    list_units(a, threads, scratch.units.as<Unit>() + each->first_unit,
               scratch.merges.as<Merge>() + each->first_merge);
  }
}

// All threads, in phases.
template <class T>
static void attention_phase(Member& member, Scratch& scratch, const Attention& a,
                            const WindowUnits& work) {
  const AttentionShape shape = shape_of<T>(a);
  const UnitList& list = work.list;
  const Unit* units = scratch.units.as<Unit>() + work.first_unit;
  float* partials = scratch.partials.as<float>();
  Workbench<T> bench(scratch.per_thread.as<float>() + member.index() * bench_floats<T>(a, shape),
                     shape, chunk_rows(a) * shape.shared);
  const int64_t chunks = list.units - list.split_units;
  member.begin(chunks + (list.split_units + list.run - 1) / list.run);
  for (int64_t task; (task = member.next()) >= 0;) {
    if (task < chunks) {
      attend_chunk<T>(a, shape, units[list.split_units + task], bench);
      member.completed(1);
    } else {
      Runs runs{member, list, chunks, 0, 0};
      runs.take(task);
      attend_runs<T>(a, shape, units, runs, bench, partials);
    }
  }
  member.end();
  const Merge* merges = scratch.merges.as<Merge>() + work.first_merge;
  member.phase(list.merges, [&](int64_t i) { merge_tiles<T>(a, shape, merges[i], partials); });
}
