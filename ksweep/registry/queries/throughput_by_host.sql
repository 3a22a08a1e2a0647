-- How fast is each machine and device?
--
-- Medians over finished runs that sampled draws, because the first run on a machine also fills caches.
SELECT host, device, num_ranks, count(*) AS num_runs, median(tokens_per_second) AS tokens_per_second,
       median(tokens_per_second_per_rank) AS tokens_per_second_per_rank, median(draws_per_second) AS draws_per_second,
       sum(num_tokens_sampled)::BIGINT AS num_tokens, sum(total_seconds) / 3600 AS hours, max(finished) AS last_run
FROM v_throughput
GROUP BY host, device, num_ranks
ORDER BY tokens_per_second_per_rank DESC NULLS LAST, host, device, num_ranks;
